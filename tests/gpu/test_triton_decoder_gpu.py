"""The Triton kernels of the decoder on a GPU, at the sizes of the presets that they are for."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.models.decoder_case import Case, assert_near, outputs_and_gradients

from scldm.nn.kernels import fused_decoder, triton_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SIZES = {
    "upstream_default": {"width": 32, "n_heads": 4, "n_tokens": 16},
    "dentate_gyrus": {"width": 128, "n_heads": 1, "n_tokens": 128},
    "census_20m": {"width": 256, "n_heads": 4, "n_tokens": 256},
}


@pytest.mark.parametrize("preset", SIZES)
@pytest.mark.parametrize("n_outputs", [1, 2])
@pytest.mark.parametrize(
    ("rounding", "precision", "tolerance"),
    [(torch.float32, "ieee", 1e-4), (torch.float32, "tf32", 2e-2), (torch.bfloat16, None, 4e-2)],
)
def test_outputs_and_gradients_are_those_of_the_torch_block_in_float64(
    preset, n_outputs, rounding, precision, tolerance
):
    case = Case(n_cells=5, n_genes=2003, n_outputs=n_outputs, rounding=rounding, **SIZES[preset])
    expected = outputs_and_gradients(fused_decoder.decode_genes, case, torch.float64, "cuda")
    decode = partial(triton_decoder.decode_genes, precision=precision)
    assert_near(outputs_and_gradients(decode, case, rounding, "cuda"), expected, tolerance)


def test_two_runs_give_the_same_bits():
    case = Case(n_cells=8, n_genes=4001, rounding=torch.bfloat16, **SIZES["census_20m"])
    first, second = (outputs_and_gradients(triton_decoder.decode_genes, case, case.rounding, "cuda") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_training_step_holds_nothing_of_the_size_of_cells_by_genes_by_width():
    case = Case(n_cells=64, n_genes=16_000, rounding=torch.bfloat16, **SIZES["dentate_gyrus"])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs_and_gradients(triton_decoder.decode_genes, case, case.rounding, "cuda")
    of_that_size = case.n_cells * case.n_genes * case.width * 2  # bytes, in bf16
    assert torch.cuda.max_memory_allocated() - before < of_that_size
