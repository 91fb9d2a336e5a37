"""The Triton kernels of the decoder compute what the hand-written torch block computes.

Triton's interpreter runs them on the CPU, in a process of its own (`decoder_case`), and its compiler compiles them for
a GPU that need not be here. On a GPU: tests/gpu/test_triton_decoder_gpu.py.
"""

from __future__ import annotations

import pytest
import torch
from helpers.models.decoder_case import Case, assert_near, interpreted, outputs_and_gradients

from scldm.nn.config import VAEConfig
from scldm.nn.kernels import fused_decoder, triton_decoder
from scldm.nn.layers import hidden_width
from scldm.nn.vae import VAE

pytest.importorskip("triton", reason="triton is not installed: pip install 'scldm[dev]' brings it on Linux")

FP32 = {
    "one_head": Case(n_heads=1),
    "several_heads_two_outputs_and_biases": Case(n_heads=4, n_outputs=2, n_genes=9, bias=True),
    "no_size_a_power_of_two": Case(
        width=36, n_heads=3, n_tokens=19, n_genes=25, n_outputs=2, multiple_of=1, tile=18
    ),
    "one_gene_one_token": Case(n_genes=1, n_tokens=1, n_cells=1, n_heads=1),
    "genes_fill_their_tiles_exactly": Case(n_genes=32, tile=16, n_cells=1),
}  # fmt: skip
BF16 = Case(width=20, n_heads=2, n_tokens=35, n_genes=34, n_outputs=2, rounding=torch.bfloat16)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By name: outputs and gradients from the kernels; one case twice."""
    cases = {**FP32, "again": FP32["genes_fill_their_tiles_exactly"], "bf16": BF16}
    found = interpreted(list(cases.values()), tmp_path_factory.mktemp("interpreted"))
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("name", FP32)
def test_outputs_and_every_gradient_are_those_of_the_torch_block_in_float64(results, name):
    expected = outputs_and_gradients(fused_decoder.decode_genes, FP32[name], torch.float64)
    assert len(expected) >= 12  # outputs; q, embedding, k, v; seven weights and more
    assert_near(results[name], expected, 5e-6)


def test_bfloat16_products_stay_within_its_resolution_and_outputs_are_fp32(results):
    expected = outputs_and_gradients(fused_decoder.decode_genes, BF16, torch.float64)
    assert results["bf16"]["out"].dtype == torch.float32
    assert results["bf16"]["q"].dtype == torch.bfloat16
    assert_near(results["bf16"], expected, 2e-2)


def test_two_runs_give_the_same_bits(results):
    for name, value in results["genes_fill_their_tiles_exactly"].items():
        assert torch.equal(value, results["again"][name]), name


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"width": 512}, r"d_model \(512\) is over 256"),
        ({"dtype": torch.float64}, r"dtype \(torch.float64\) must be float32 or bfloat16"),
        ({"n_outputs": 3}, r"n_outputs \(3\) must be 1 or 2"),
    ],
)
def test_unsupported_decoders_are_refused_with_a_reason(choices, reason):
    arguments = {"width": 16, "n_outputs": 1, "dtype": torch.float32, **choices}
    with pytest.raises(ValueError, match=reason):
        outputs_and_gradients(
            triton_decoder.decode_genes,
            Case(width=arguments["width"], n_outputs=arguments["n_outputs"]),
            arguments["dtype"],
        )


def test_the_kernels_are_opt_in_and_an_unsupported_width_is_reported():
    vae = VAE(VAEConfig(d_model=512), n_genes=3)
    z, sizes = torch.randn(1, 16, 16), torch.ones(1)
    assert vae.decoder.kernels == "torch"
    assert vae.decode(z, sizes).mu.shape == (1, 3)
    vae.decoder.kernels = "triton"
    with pytest.raises(ValueError, match=r"no Triton kernel for this decoder: d_model \(512\) is over 256"):
        vae.decode(z, sizes)


def test_the_kernels_compile_for_a_gpu_and_fit_its_shared_memory(tmp_path, monkeypatch):
    from scldm.nn.kernels.triton_gradients import keys_kernel, rows_kernel, weights_kernel
    from scldm.nn.kernels.triton_kernels import decode_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    d, h, m = 256, 4, 256  # census_20m, the widest that they take
    k, q = torch.empty(1, h, m, d // h), torch.empty(1, d, dtype=torch.bfloat16)
    sizes = triton_decoder._sizes(k, q, n_hidden=hidden_width(d, 4), n_outputs=2, rows=32)
    plan = triton_decoder.Plan(sizes, 1e-8, 32, "tf32")
    for kernel in (decode_kernel, rows_kernel, weights_kernel, keys_kernel):
        shared = _compiled(kernel, plan.options(kernel), capability=80).metadata.shared
        assert shared <= 163 << 10, f"{kernel.__name__} asks for {shared} bytes; an A100 has 163 KiB"


def _compiled(kernel, options, *, capability):
    """As a launch with bf16 tensors would: a pointer for every tensor, 32-bit sizes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    written_in_fp32 = {"out", "lse", "grad", "dx_rows", "dq_rows", "delta", "d_norm", "d_head_x", "d_gate_up"}
    written_in_fp32 |= {"d_head_hidden", "d_keys", "d_values"}
    kinds = {"eps": "fp32", "G": "i32", "N": "i32", "n_each": "i32", **dict.fromkeys(options, "constexpr")}
    kinds |= dict.fromkeys(written_in_fp32, "*fp32")
    signature = {name: kinds.get(name, "*bf16") for name in kernel.arg_names}
    constants = {(i,): options[name] for i, name in enumerate(kernel.arg_names) if name in options}
    launch = {name: options[name] for name in ("num_warps", "num_stages")}
    return triton.compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", capability, 32), options=launch)
