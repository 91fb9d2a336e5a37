"""Networks on a GPU in fp32, tf32 and bf16, beside fp32 on the CPU."""

from __future__ import annotations

import pytest
import torch
from helpers.models.precision_case import a_dit, a_vae, in_precision, latents_of, some_cells

from scldm.nn.kernels.precision import available, resolve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
# Standard deviation of the error: of latents of variance 1, and relative to the mean counts.
BOUNDS = {"fp32": (1e-4, 1e-4), "tf32": (2e-3, 1e-3), "bf16": (1e-2, 5e-3)}


@pytest.fixture(params=BOUNDS)
def precision(request):
    if request.param not in available(DEVICE):
        pytest.skip(f"this card has no {request.param}")
    return request.param


def test_the_default_is_the_fastest_that_the_card_has():
    assert resolve(None, DEVICE) == available(DEVICE)[0]


@pytest.mark.parametrize("head", ["nb_shared", "nb_cell"])
@pytest.mark.parametrize("input_", ["count_aware", "log1p"])
def test_latents_means_and_likelihoods_are_near_those_of_the_cpu(precision, head, input_):
    vae, cells = a_vae(head=head, input=input_), some_cells()
    z = vae.encode(cells)
    mu, nll = vae.decode_mu(z, cells.library_size), vae.nll(cells, z)
    vae, cells = in_precision(vae.to(DEVICE), precision), cells.to(DEVICE)
    found = vae.encode(cells)
    of_latents, of_means = BOUNDS[precision]
    assert found.dtype == torch.float32
    assert (found.cpu() - z).std() < of_latents
    found_mu = vae.decode_mu(z.to(DEVICE), cells.library_size)
    assert ((found_mu.cpu() - mu) / mu).std() < of_means
    torch.testing.assert_close(found_mu.sum(1), cells.library_size, rtol=1e-5, atol=0)
    torch.testing.assert_close(vae.nll(cells, found).cpu(), nll, rtol=5e-4, atol=0)


def test_cells_of_a_flow_are_near_those_of_the_cpu(precision):
    dit = a_dit()
    expected = latents_of(dit, "adams")
    found = latents_of(in_precision(dit.to(DEVICE), precision), "adams").cpu()
    assert found.dtype == torch.float32
    assert (found - expected).std() < BOUNDS[precision][0] * expected.std()


def test_a_precision_gives_the_same_bits_again_and_others_than_fp32(precision):
    vae, cells = a_vae().to(DEVICE), some_cells().to(DEVICE)
    exact = in_precision(vae, "fp32").encode(cells)
    found = in_precision(vae, precision).encode(cells)
    assert torch.equal(found, vae.encode(cells))
    assert torch.equal(found, exact) == (precision == "fp32")
    assert not torch.backends.cuda.matmul.allow_tf32
