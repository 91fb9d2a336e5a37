"""Networks in bf16: near fp32, fp32 outside of their products, and no other model of the process changes."""

from __future__ import annotations

import pytest
import torch
from helpers.models.precision_case import a_dit, a_vae, in_precision, latents_of, some_cells

from scldm.flow.config import PathConfig, SamplerConfig, Solver
from scldm.flow.guidance import guided_velocity
from scldm.flow.likelihood import log_likelihood, rademacher
from scldm.flow.sampler import time_grid
from scldm.nn.kernels import precision
from scldm.nn.kernels.precision import PrecisionError, available, products, resolve, set_precision
from scldm.nn.vae import CountDistribution

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def in_bf16(network):
    return in_precision(network, "bf16")


@pytest.mark.parametrize("head", ["nb_shared", "nb_cell"])
@pytest.mark.parametrize("input_", ["count_aware", "log1p", "proj", "projconcat", "softbin"])
def test_latents_means_and_likelihoods_in_bf16_are_near_those_in_fp32(head, input_):
    vae, cells = a_vae(head=head, input=input_), some_cells()
    z = vae.encode(cells)
    decoded, nll = vae.decode(z, cells.library_size), vae.nll(cells, z)
    assert isinstance(decoded, CountDistribution)
    in_bf16(vae)
    z_low, decoded_low = vae.encode(cells), vae.decode(z, cells.library_size)
    assert {z_low.dtype, decoded_low.mu.dtype, decoded_low.theta.dtype} == {torch.float32}
    assert 0 < (z_low - z).std() < 0.01  # of latents with variance 1
    assert 0 < ((decoded_low.mu - decoded.mu) / decoded.mu).std() < 0.005
    torch.testing.assert_close(decoded_low.mu.sum(1), cells.library_size, rtol=1e-5, atol=0)  # the softmax is fp32
    if head == "nb_shared":
        assert torch.equal(decoded_low.theta, decoded.theta)
    torch.testing.assert_close(vae.nll(cells, z_low), nll, rtol=5e-4, atol=0)


@pytest.mark.parametrize("head", ["nb_shared", "gaussian"])
def test_logits_are_not_rounded(head):
    """They go into a softmax over all genes: rounded to bf16, one near 8 would be off by up to 0.03."""
    vae, cells = in_bf16(a_vae(head=head)), some_cells()
    out = vae.decoder(vae.encode(cells), vae.gene_embedding)
    assert (out == out.bfloat16()).float().mean() < 0.1


def test_pooling_as_one_attention_in_bf16_is_near_fp32():
    """As on a GPU."""
    vae, cells = a_vae(), some_cells()
    vae.encoder.packed = True
    z = vae.encode(cells)
    found = in_bf16(vae).encode(cells)
    assert found.dtype == torch.float32
    assert 0 < (found - z).std() < 0.01


def test_a_gaussian_head_in_bf16_is_near_fp32():
    vae, cells = a_vae(head="gaussian"), some_cells()
    z = vae.encode(cells)
    mu = vae.decode_mu(z, cells.library_size)
    found = in_bf16(vae).decode_mu(z, cells.library_size)
    assert found.dtype == torch.float32
    assert (found - mu).std() < 0.01 * mu.std()


def test_hand_written_kernels_give_way_to_plain_products_in_bf16():
    vae, cells = a_vae(), some_cells()
    z = in_bf16(vae).encode(cells)
    expected = vae.decode_mu(z, cells.library_size)
    vae.encoder.plain = True
    assert torch.equal(vae.encode(cells), z)
    with pytest.raises(ValueError, match=r"not for .* in bf16"):
        vae.decoder(z, vae.gene_embedding, fused=True)
    plain = vae.decoder(z, vae.gene_embedding, fused=False)
    assert torch.equal(plain, vae.decoder(z, vae.gene_embedding))
    assert expected.isfinite().all()


@pytest.mark.parametrize("solver", ["adams", "midpoint", "rk4"])
def test_cells_of_a_flow_in_bf16_are_near_those_in_fp32_and_its_state_is_fp32(solver: Solver):
    dit = a_dit()
    expected = latents_of(dit, solver)
    found = latents_of(in_bf16(dit), solver)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).std() < 0.01 * expected.std()
    assert not torch.equal(found, found.bfloat16().float())  # the state is not rounded


def test_the_likelihood_of_latents_in_bf16_is_near_that_in_fp32():
    dit, z = a_dit(), torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(3))
    probe = rademacher(z.shape, generator=torch.Generator().manual_seed(4), device=CPU)
    times = time_grid(SamplerConfig(solver="midpoint", steps=8), PathConfig())[::-1]

    def log_prob():
        velocity = guided_velocity(dit, {"a": torch.arange(6) % 3}, scale=1.0, path=PathConfig(), one_time=True)
        with torch.no_grad():
            return log_likelihood(velocity, z, times, probe=probe, solver="midpoint").log_prob

    expected = log_prob()
    in_bf16(dit)
    torch.testing.assert_close(log_prob(), expected, rtol=5e-3, atol=0)


def test_a_network_without_a_precision_and_one_in_fp32_compute_the_same():
    vae, cells = a_vae(), some_cells()
    z = vae.encode(cells)
    for set_to in ("bf16", "fp32", None):
        set_precision(vae, set_to)
        assert torch.equal(vae.encode(cells), z) == (set_to != "bf16")


def test_copies_keep_the_precision_and_weights_stay_fp32():
    dit = in_bf16(a_dit())
    assert dit.with_classes({}).precision == "bf16"
    assert {p.dtype for p in dit.parameters()} == {torch.float32}


def test_no_switch_is_left_on_even_if_a_pass_fails():
    matmul = torch.backends.cuda.matmul
    seen = {}
    for wanted in ("tf32", "fp32"):
        with products(wanted, "cuda"):
            seen[wanted] = matmul.allow_tf32
    assert seen == {"tf32": True, "fp32": False}
    with pytest.raises(ZeroDivisionError), products("tf32", "cuda"):
        raise ZeroDivisionError
    assert not matmul.allow_tf32
    vae, cells = in_bf16(a_vae()), some_cells()
    with pytest.raises(ValueError, match="z must be"):
        vae.decode(torch.zeros(2, 1, 1), cells.library_size)
    assert not torch.is_autocast_enabled("cpu")


def test_tf32_of_another_model_is_given_back():
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = True
    try:
        with products("fp32", "cuda"):
            assert not matmul.allow_tf32
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = False


# ---- which precision ----------------------------------------------------------------------------------------------
CARDS = {  # compute capability, bf16 products -> precisions, the default first
    "A100": ((8, 0), True, ("bf16", "tf32", "fp32")),
    "V100": ((7, 0), False, ("fp32",)),
}


@pytest.fixture
def card(monkeypatch):
    def pretend(name: str):
        capability, bf16, _ = CARDS[name]
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.version, "cuda", "12.8")

    return pretend


@pytest.mark.parametrize("name", CARDS)
def test_the_default_is_the_fastest_of_a_card(card, name):
    card(name)
    assert available(GPU) == CARDS[name][2]
    assert resolve(None, GPU) == CARDS[name][2][0]
    assert resolve(None, GPU, solver="dopri5") == "fp32"


def test_the_default_of_a_cpu_is_fp32_and_bf16_can_be_asked_for():
    assert resolve(None, CPU) == "fp32"
    assert resolve("bf16", CPU) == "bf16"


def test_what_a_device_lacks_is_refused_with_what_it_has(card):
    with pytest.raises(
        PrecisionError, match=r"encode.precision \(tf32\) exists on NVIDIA GPUs.*set encode.precision=fp32"
    ):
        resolve("tf32", CPU, where="encode.precision")
    card("V100")
    with pytest.raises(PrecisionError, match=r"precision \(bf16\): V100 computes no bf16 products, it has fp32"):
        resolve("bf16", GPU)
    assert issubclass(PrecisionError, precision.InputError)
