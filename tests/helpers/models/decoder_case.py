"""One decoder block with drawn inputs, its outputs and every gradient: by any of the forms that compute it.

Run as a script it computes cases with Triton's interpreter, which must be chosen before triton is imported and would
stay chosen: hence a process of its own. `python decoder_case.py cases.pt results.pt`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scldm.nn.config import VAEConfig
from scldm.nn.decoder import Decoder


@dataclass(frozen=True)
class Case:
    n_cells: int = 2
    n_genes: int = 20
    width: int = 16
    n_heads: int = 2
    n_tokens: int = 8
    n_outputs: int = 1
    bias: bool = False
    multiple_of: int = 4
    tile: int | None = None  # genes per tile
    rounding: torch.dtype = torch.float32  # of inputs and weights, for either side

    def draw(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Decoder, dict[str, Tensor], Tensor]:
        """The decoder that owns the block, the block's inputs, and the loss's weights on its outputs."""
        torch.manual_seed(0)
        config = VAEConfig(
            d_model=self.width, n_heads=1, n_heads_cross=self.n_heads, n_layers=0, bias=self.bias,
            multiple_of=self.multiple_of,
        )  # fmt: skip
        block = Decoder(config, n_outputs=self.n_outputs)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        b, g, h, m, d = self.n_cells, self.n_genes, self.n_heads, self.n_tokens, self.width
        shapes = {"q": (g, d), "embedding": (g, d), "k": (b, h, m, d // h), "v": (b, h, m, d // h)}
        weight = torch.randn(b, g, self.n_outputs)
        inputs = {name: torch.randn(shape).to(self.rounding).to(device, dtype) for name, shape in shapes.items()}
        block = block.to(self.rounding).to(device, dtype)
        return block, {name: x.requires_grad_() for name, x in inputs.items()}, weight.to(device)


def outputs_and_gradients(
    decode: Callable[..., Tensor], case: Case, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    block, inputs, weight = case.draw(dtype, device)
    out = decode(*inputs.values(), block=block, eps=1e-8, tile=case.tile)
    (out * weight).sum().backward()
    leaves = {**inputs, **dict(block.named_parameters())}
    return {"out": out.detach(), **{name: x.grad for name, x in leaves.items() if x.grad is not None}}


def assert_near(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Within `tolerance` of each tensor's largest entry."""
    assert ours.keys() == expected.keys()
    far = {}
    for name, value in expected.items():
        apart, largest = (ours[name].double() - value).abs().max().item(), value.abs().max().item()
        if not apart <= tolerance * largest:  # a NaN is far too
            far[name] = f"{apart:.2g} of {largest:.2g}"
    assert not far, f"further apart than {tolerance} of the largest entry: {far}"


def interpreted(cases: Sequence[Case], folder: Path) -> list[dict[str, Tensor]]:
    """Outputs and gradients of the Triton kernels on the CPU."""
    torch.save(list(cases), folder / "cases.pt")
    path = os.pathsep.join(str(Path(__file__).resolve().parents[n]) for n in (2, 3))  # tests/ and the repository
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__, str(folder / "cases.pt"), str(folder / "results.pt")]
    subprocess.run(command, check=True, env=environment)
    return torch.load(folder / "results.pt", weights_only=False)


def _multiply_bfloat16_as_a_gpu_does() -> None:
    """The interpreter keeps bfloat16 as uint16 and multiplies integers; a GPU multiplies numbers and sums in fp32."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def number(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: multiply(self, number(a), number(b), *rest)


if __name__ == "__main__":
    from scldm.nn.kernels.triton_decoder import decode_genes

    _multiply_bfloat16_as_a_gpu_does()
    asked = torch.load(sys.argv[1], weights_only=False)
    torch.save([outputs_and_gradients(decode_genes, case, case.rounding) for case in asked], sys.argv[2])
