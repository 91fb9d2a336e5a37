"""A GPU computes what the CPU computes: encoding, likelihood, gradients, decoding, sampling, cells, prefetching."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.models.device_case import (
    apart,
    distances,
    flow_quantities,
    generated,
    prefetched,
    samples,
    vae_quantities,
)

REAL = torch.cuda.is_available() and (torch.version.cuda is not None or torch.version.hip is not None)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not REAL, reason="no CUDA device, or one that is only pretended: torch has no CUDA here"),
]
FORMS = {
    "count_aware": {}, "log1p": {"input": "log1p"}, "projconcat": {"input": "projconcat"},
    "dispersion by cell": {"head": "nb_cell"}, "pads": {"input": "log1p", "genes_seq_len": 300},
    "narrow heads": {"n_heads_cross": 8}, "gaussian": {"head": "gaussian", "gene_bias": False},
}  # fmt: skip


def worst(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {apart:.2g}" for name, apart in sorted(found.items(), key=lambda x: -x[1])[:5])


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("form", FORMS)
def test_a_vae_step_is_that_of_the_cpu(form):
    """Latents, means, likelihood, every gradient, and the weights after AdamW."""
    found = distances(partial(vae_quantities, **FORMS[form]), "cuda")
    assert max(found.values()) < 1e-3, worst(found)
    assert max(found[k] for k in ("latents", "mu", "nll")) < 1e-4, worst(found)


def test_the_same_genes_are_scored_and_weigh_the_same():
    found = distances(partial(vae_quantities, sampled=True), "cuda")
    assert max(found.values()) < 1e-3, worst(found)


def test_a_flow_step_is_that_of_the_cpu():
    found = distances(flow_quantities, "cuda")
    assert max(found.values()) < 1e-3, worst(found)


@pytest.mark.parametrize("compute", [vae_quantities, flow_quantities])
def test_bf16_is_near_fp32_on_the_same_device(compute):
    found = apart(compute("cuda", precision="bf16"), compute("cuda"))
    for name, value in found.items():
        assert value < (0.15 if name.startswith("grad") else 0.02), f"{name}: {value:.3g}"


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "heun3", "rk4", "adams", "dopri5"])
def test_samples_are_those_of_the_cpu(solver):
    found = distances(partial(samples, solver=solver), "cuda")
    assert found["latents"] < 1e-3, worst(found)


def test_generated_cells_are_those_of_the_cpu_but_for_draws_at_the_edge_of_rounding():
    here, there = generated("cpu"), generated("cuda")
    assert torch.equal(here["library_size"], there["library_size"])  # drawn on the host, by cell id
    torch.testing.assert_close(there["latents"], here["latents"], rtol=1e-3, atol=1e-3)
    assert (here["counts"] == there["counts"]).float().mean() > 0.995


def test_two_runs_give_the_same_bits():
    first, second = (generated("cuda") for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_prefetched_batches_are_whole_when_they_are_used():
    """Pinned copies on a stream of their own, read by the next one: a missing wait would show as other numbers."""
    for here, there in zip(prefetched("cpu"), prefetched("cuda"), strict=True):
        for name, value in here.items():
            assert there[name].is_cuda
            torch.testing.assert_close(there[name].cpu(), value)


def test_a_compiled_step_is_near_the_eager_one():
    from pipeline.training.engine.compiled_blocks import compile_blocks
    from scldm.nn.vae import VAE

    exact = vae_quantities("cuda")
    build = VAE.__init__

    def compiled(self, *given, **more):
        build(self, *given, **more)
        compile_blocks(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VAE, "__init__", compiled)
        found = vae_quantities("cuda")
    for name in ("latents", "mu", "nll", "weights"):
        torch.testing.assert_close(found[name], exact[name], rtol=1e-3, atol=1e-3, msg=name)
