"""The decoder's last block over all genes in Triton: `scldm.nn.kernels.fused_decoder.decode_genes` for a GPU.

Forward, one kernel: a program takes a tile of genes of one cell from queries to outputs. Kept for the backward pass are
the inputs and one number per head, gene and cell (the log normaliser of the attention).

Backward, three kernels per chunk of genes (`triton_gradients`), which compute the chunk again. They exchange y, dx and
dq of the chunk's rows, at most WORKSPACE numbers each (or one tile of genes of all cells, if that is more), for any b
and g. Every sum has one owner and one order, so gradients are bitwise equal from run to run. The cost of determinism:
in the backward pass the first two products of the SwiGLU are computed twice, the attention's scores
four times and the gradient of its weights three times; `PROGRAMS` blocks of partial sums hold the gradient of the
SwiGLU's matrices. The forward pass computes the scores twice.

The output projection is folded into the values, as in the torch version. With several heads that is more arithmetic
than necessary: h m d instead of (m + d) d per gene for the values' product, a fifth of the whole at census_20m's sizes.

A program holds rows of width d, so d is limited: `unsupported_reason` says why a decoder takes the torch path.

The likelihood is not fused: it reads the outputs (b, g, r) from memory (`scldm.nn.kernels.nb_sparse`).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scldm.nn.kernels.fused_decoder import Weights, folded_weights

Precision = Literal["ieee", "tf32"]

MAX_WIDTH = 256  # a tile of rows and a block of weights fill registers and shared memory
WORKSPACE = 2**22  # numbers; y, dx and dq of a chunk stay in the second-level cache of an H100
PROGRAMS = 512  # for the weights' gradient: a few per multiprocessor


def unsupported_reason(*, width: int, n_outputs: int, dtype: torch.dtype) -> str | None:
    """Return the reason why the kernels cannot compute a decoder; None if they can."""
    if not _installed():
        return "triton is not installed"
    if width > MAX_WIDTH:
        return f"d_model ({width}) is over {MAX_WIDTH}: a tile of whole rows does not fit a multiprocessor"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype ({dtype}) must be float32 or bfloat16"
    if n_outputs > 2:
        return f"n_outputs ({n_outputs}) must be 1 or 2"
    return None


def _precision() -> Precision:
    """Return the precision that the user allows for torch's fp32 products (`torch.set_float32_matmul_precision`)."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def decode_genes(
    q: Tensor,
    embedding: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: Any,
    eps: float,
    tile: int | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """Return the outputs (b, g, r), fp32.

    Args:
        q: Projected queries of the genes, heads merged, (g, d). Products use their dtype.
        embedding: Gene embeddings, the residual stream, (g, d).
        k, v: Keys and values of the latent tokens, (b, h, m, c).
        block: Owner of `out`, `norm_mlp`, `mlp` and `head` (the decoder).
        eps: Epsilon of the LayerNorm.
        tile: Genes per chunk of the backward pass; by default as many as WORKSPACE holds.
        precision: Precision of fp32 products; by default torch's.
    """
    reason = unsupported_reason(width=q.shape[1], n_outputs=len(block.head.weight), dtype=q.dtype)
    if reason is not None:
        raise ValueError(f"no Triton kernel for this decoder: {reason}")
    precision = precision or _precision()
    if block.out.bias is not None:
        embedding = embedding + block.out.bias
    w = folded_weights(k, v, block)
    products = {name: getattr(w, name).to(q.dtype) for name in ("keys", "values", "gate", "up")}
    rows = 16 if q.dtype == torch.float32 and precision == "ieee" else 32
    sizes = _sizes(k, q, n_hidden=len(w.gate), n_outputs=len(w.head_x), rows=rows)
    plan = Plan(sizes, eps, tile or max(sizes["T"], WORKSPACE // (len(k) * q.shape[1])), precision)
    return _Decode.apply(plan, q / math.sqrt(k.shape[-1]), embedding, *w._replace(**products))


@dataclass(frozen=True)
class Plan:
    """Launch parameters of the kernels."""

    sizes: Mapping[str, int]  # the kernels' capital letters
    eps: float
    tile: int  # genes of a chunk
    precision: Precision

    def options(self, kernel: Any) -> dict[str, Any]:
        """Return the keyword arguments of a launch: sizes that the kernel takes, precision, warps and stages."""
        return {
            **{name: self.sizes[name] for name in kernel.arg_names if name in self.sizes},
            "PRECISION": self.precision,
            "num_warps": 4 if self.sizes["BD"] < 256 else 8,
            "num_stages": 2,
        }


def _sizes(k: Tensor, q: Tensor, *, n_hidden: int, n_outputs: int, rows: int) -> dict[str, int]:
    """Return shapes and block sizes. A block is a power of two, and at least 16 where a product needs it.

    By ptxas, for compute capability 9.0 and bf16: with 32 rows a program stays in its registers at d = 128 and at 256
    (4 bytes spilt in one kernel), with 64 it does not; without tensor cores 32 are too many and 16 nearly fit.
    """
    (_, h, m, c), d = k.shape, q.shape[1]
    return {
        "M": m, "D": d, "H": h, "C": c, "F": n_hidden, "R": n_outputs,
        "T": rows, "BM": min(_block(m), rows), "BC": _block(c), "BD": _block(d), "BF": min(_block(n_hidden), rows),
        "BR": _block(n_outputs, least=1),
    }  # fmt: skip


def _block(n: int, *, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, q: Tensor, embedding: Tensor, *tensors: Tensor) -> Tensor:
        from scldm.nn.kernels.triton_kernels import decode_kernel

        q, embedding, *tensors = (x.contiguous() for x in (q, embedding, *tensors))  # type: ignore[assignment]
        w, (g, s) = Weights(*tensors), (len(q), plan.sizes)
        out = q.new_empty(len(w.keys), g, s["R"], dtype=torch.float32)
        lse = q.new_empty(len(w.keys), s["H"], g, dtype=torch.float32)
        with torch.cuda.device_of(q):
            decode_kernel[-(-g // s["T"]), len(w.keys)](
                q, embedding, *w, out, lse, plan.eps, g, **plan.options(decode_kernel)
            )
        ctx.plan = plan
        ctx.save_for_backward(lse, q, embedding, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lse, q, embedding, *tensors = ctx.saved_tensors
        plan, w = ctx.plan, Weights(*tensors)
        dq, d_embedding = torch.empty_like(q), torch.empty_like(embedding)
        sums = _Sums.zeros(w, plan.sizes, rows=len(w.keys) * min(plan.tile, len(q)))
        with torch.cuda.device_of(q):
            for start in range(0, len(q), plan.tile):
                at = slice(start, start + plan.tile)
                chunk = _Chunk(q[at], embedding[at], lse[:, :, at].contiguous(), grad[:, at].contiguous())
                chunk.add_gradients(w, plan, sums, dq[at], d_embedding[at])
        dw = sums.gradients(w, head_bias=grad.sum((0, 1)))
        return None, dq, d_embedding, *(x.to(like.dtype) for x, like in zip(dw, w, strict=True))


@dataclass(frozen=True)
class _Sums:
    """Sums over all chunks, fp32."""

    keys: Tensor  # (b, h, m, c)
    values: Tensor  # (b, h m, d)
    norm: Tensor  # (2, d)
    gate_up: Tensor  # (shares, 2, f, d)
    head_x: Tensor  # (r, d)
    head_hidden: Tensor  # (shares, r, f)

    @classmethod
    def zeros(cls, w: Weights, s: Mapping[str, int], *, rows: int) -> _Sums:
        """Return sums of zeros, with `rows` rows in a chunk."""
        d, f, r = s["D"], s["F"], s["R"]
        shares = max(1, min(PROGRAMS // -(-f // s["BF"]), -(-rows // s["T"])))
        shapes = (w.keys.shape, w.values.shape, (2, d), (shares, 2, f, d), (r, d), (shares, r, f))
        return cls(*(w.keys.new_zeros(shape, dtype=torch.float32) for shape in shapes))

    def gradients(self, w: Weights, *, head_bias: Tensor) -> Weights:
        """Return the gradients of the weights, as the sums over their shares."""
        (norm_weight, norm_bias), (gate, up) = self.norm, self.gate_up.sum(0)
        head_hidden = self.head_hidden.sum(0)
        return Weights(
            self.keys, self.values, norm_weight, norm_bias, gate, up, self.head_x, head_hidden, head_bias
        )  # fmt: skip


@dataclass(frozen=True)
class _Chunk:
    """A chunk of genes of all cells, G genes and N = b G rows."""

    q: Tensor  # (G, d)
    embedding: Tensor  # (G, d)
    lse: Tensor  # (b, h, G)
    grad: Tensor  # (b, G, r), fp32

    def add_gradients(self, w: Weights, plan: Plan, sums: _Sums, dq: Tensor, d_embedding: Tensor) -> None:
        """Add the chunk's share to `sums`; write `dq` and `d_embedding` (G, d)."""
        from scldm.nn.kernels.triton_gradients import keys_kernel, rows_kernel, weights_kernel

        q, s, (b, g, r) = self.q, plan.sizes, self.grad.shape
        n_tiles, fp32 = -(-g // s["T"]), {"dtype": torch.float32, "device": q.device}
        y = torch.empty(b, g, s["D"], dtype=q.dtype, device=q.device)
        dx, dq_rows = torch.empty(b, g, s["D"], **fp32), torch.empty(b, g, s["D"], **fp32)
        delta = torch.empty_like(self.lse)
        norm, head_x = torch.empty(b * n_tiles, 2, s["D"], **fp32), torch.empty(b * n_tiles, r, s["D"], **fp32)
        rows_kernel[n_tiles, b](
            q, self.embedding, *w[:-1], self.lse, self.grad, y, dx, dq_rows, delta, norm, head_x, plan.eps, g,
            **plan.options(rows_kernel),
        )  # fmt: skip
        dq.copy_(dq_rows.sum(0))
        d_embedding.copy_(dx.sum(0))
        sums.norm.add_(norm.sum(0))
        sums.head_x.add_(head_x.sum(0))

        shares = len(sums.gate_up)
        weights_kernel[-(-s["F"] // s["BF"]), shares](
            y, self.grad, w.gate, w.up, w.head_hidden, sums.gate_up, sums.head_hidden, b * g, -(-b * g // shares),
            **plan.options(weights_kernel),
        )  # fmt: skip
        keys_kernel[-(-s["M"] // s["BM"]), s["H"], b](
            q, w.keys, w.values, self.lse, delta, dx, sums.keys, sums.values, g,
            **plan.options(keys_kernel),
        )  # fmt: skip
