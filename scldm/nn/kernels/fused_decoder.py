"""The decoder's last block over all genes, with a backward pass written by hand.

Each gene of each cell: attention to the cell's m latent tokens, residual, LayerNorm, SwiGLU, head. With autograd and
recompute (`Decoder._tile`, the plain reference) a training step pays for many small operations and short-lived
tensors; here a tile is computed again in the backward pass and differentiated in place, so that a step is mostly
matrix products. Nothing of size b x g x d is kept, forward or backward.

Two foldings, exact: the output projection goes into the values (softmax(s) V W_o = softmax(s) (V W_o)), and the keys
become one block-diagonal matrix over heads, so that scores of all heads are one product in the layout the next product
wants. The second wastes arithmetic on zeros: `folds` tells for which shapes it pays off.

Shape letters: b cells, g genes, t genes of a tile, n = b t, m latent tokens, d model width, h heads, c channels per
head, f hidden width, r outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 2048  # cells x genes of a tile and thread: its widest tensors stay in the second-level cache


def folds(*, n_heads: int, channels: int, dtype: torch.dtype) -> bool:
    """Return whether this path is the faster one: one head, or narrow heads, which are poor matrix products."""
    return dtype in (torch.float32, torch.float64) and (n_heads == 1 or channels < 32)


class Weights(NamedTuple):
    """Weights of a tile besides queries and embeddings, in the order of the autograd functions' arguments."""

    keys: Tensor  # (b, d, h m), block-diagonal over heads; (b, h, m, c) for `scldm.nn.kernels.triton_decoder`
    values: Tensor  # (b, h m, d), output projection folded in
    norm_weight: Tensor  # (d,)
    norm_bias: Tensor  # (d,)
    gate: Tensor  # (f, d)
    up: Tensor  # (f, d)
    head_x: Tensor  # (r, d): the head on the residual stream
    head_hidden: Tensor  # (r, f): head times the SwiGLU's last matrix
    head_bias: Tensor  # (r,)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a launch."""

    n_heads: int
    eps: float
    tile: int  # genes


def block_diagonal_keys(k: Tensor) -> Tensor:
    """Arrange keys (b, h, m, c) as a block-diagonal matrix over heads, (b, h c, h m)."""
    b, h, m, c = k.shape
    out = k.new_zeros(b, h, c, h, m)
    head = torch.arange(h, device=k.device)
    out[:, head, :, head] = k.permute(1, 0, 3, 2)
    return out.view(b, h * c, h * m)


def folded_weights(keys: Tensor, v: Tensor, block: Any) -> Weights:
    """Return the block's weights with its output projection in the values and its last matrix in the head."""
    _, h, _, c = v.shape
    values = torch.einsum("bhmc,dhc->bhmd", v, block.out.weight.unflatten(1, (h, c))).flatten(1, 2)
    return Weights(
        keys,
        values,
        block.norm_mlp.weight,
        block.norm_mlp.bias,
        block.mlp.gate.weight,
        block.mlp.up.weight,
        block.head.weight,
        block.head.weight @ block.mlp.down.weight,
        block.head.bias,
    )


def decode_genes(
    q: Tensor, embedding: Tensor, k: Tensor, v: Tensor, *, block: Any, eps: float, tile: int | None = None
) -> Tensor:
    """Return the outputs (b, g, r).

    Args:
        q: Projected queries of the genes, heads merged, (g, d).
        embedding: Gene embeddings, the residual stream, (g, d).
        k, v: Keys and values of the latent tokens, (b, h, m, c).
        block: Owner of `out`, `norm_mlp`, `mlp` and `head` (the decoder).
        eps: Epsilon of the LayerNorm.
        tile: Genes per tile; by default as many as fit the cache.
    """
    b, h, _, c = k.shape
    if block.out.bias is not None:
        embedding = embedding + block.out.bias
    weights = folded_weights(block_diagonal_keys(k), v, block)
    sizes = Sizes(h, eps, tile or max(16, ROWS * torch.get_num_threads() // b))
    return _Decode.apply(sizes, q / math.sqrt(c), embedding, *weights)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: Sizes, q: Tensor, embedding: Tensor, *tensors: Tensor) -> Tensor:
        ctx.sizes = sizes
        ctx.save_for_backward(q, embedding, *tensors)
        w = Weights(*tensors)
        parts = [
            _tile_outputs(q_tile, e_tile, w, sizes)
            for q_tile, e_tile in zip(q.split(sizes.tile), embedding.split(sizes.tile), strict=True)
        ]
        return torch.cat(parts, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, embedding, *tensors = ctx.saved_tensors
        sizes, w = ctx.sizes, Weights(*tensors)
        dq, d_embedding = torch.empty_like(q), torch.empty_like(embedding)
        dw = Weights(*(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in w))
        for start in range(0, len(q), sizes.tile):
            at = slice(start, start + sizes.tile)
            _tile_gradients(q[at], embedding[at], w, sizes, grad[:, at], dw, dq[at], d_embedding[at])
        torch.sum(grad, (0, 1), out=dw.head_bias)
        return None, dq, d_embedding, *dw


def _attend(q: Tensor, embedding: Tensor, w: Weights, n_heads: int) -> tuple[Tensor, Tensor]:
    """Return the residual stream (b, t, d) after attention, and the attention's weights (b, t, h m)."""
    b = len(w.keys)
    scores = torch.bmm(q.expand(b, *q.shape), w.keys)
    weights = scores.unflatten(2, (n_heads, -1)).softmax(-1).flatten(2)
    return torch.baddbmm(embedding.expand(b, *embedding.shape), weights, w.values), weights


def _tile_outputs(q: Tensor, embedding: Tensor, w: Weights, sizes: Sizes) -> Tensor:
    x, _ = _attend(q, embedding, w, sizes.n_heads)
    y = F.layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, sizes.eps).flatten(0, 1)
    hidden = F.silu(y @ w.gate.T, inplace=True).mul_(y @ w.up.T)  # (n, f)
    out = torch.addmm(w.head_bias, hidden, w.head_hidden.T).addmm_(x.flatten(0, 1), w.head_x.T)
    return out.view(*x.shape[:2], -1)


def _tile_gradients(
    q: Tensor, embedding: Tensor, w: Weights, sizes: Sizes, grad: Tensor, dw: Weights, dq: Tensor, d_embedding: Tensor
) -> None:
    """Add the tile's share to `dw`; write `dq` and `d_embedding` (t, d). `grad` is (b, t, r)."""
    b, (t, d) = len(w.keys), q.shape
    x, attention = _attend(q, embedding, w, sizes.n_heads)
    y, mean, rstd = torch.native_layer_norm(x, (d,), w.norm_weight, w.norm_bias, sizes.eps)
    grad = grad.reshape(b * t, -1)
    dy = _swiglu_gradients(y.view(-1, d), w, grad, dw)
    dx, d_norm_weight, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
        dy.view_as(x), x, (d,), mean, rstd, w.norm_weight, w.norm_bias, (True, True, True)
    )
    dw.norm_weight.add_(d_norm_weight)
    dw.norm_bias.add_(d_norm_bias)
    dx.view(-1, d).addmm_(grad, w.head_x)
    dw.head_x.addmm_(grad.T, x.view(-1, d))

    torch.sum(dx, 0, out=d_embedding)
    dw.values.baddbmm_(attention.transpose(1, 2), dx)
    d_attention = torch.bmm(dx, w.values.transpose(1, 2)).unflatten(2, (sizes.n_heads, -1))
    attention = attention.unflatten(2, (sizes.n_heads, -1))
    d_scores = torch._softmax_backward_data(d_attention, attention, -1, attention.dtype).flatten(2)
    torch.sum(torch.bmm(d_scores, w.keys.transpose(1, 2)), 0, out=dq)
    dw.keys.baddbmm_(q.T.expand(b, d, t), d_scores)


def _swiglu_gradients(y: Tensor, w: Weights, grad: Tensor, dw: Weights) -> Tensor:
    """Return the gradient by y (n, d); every product of size n x f is overwritten by the next one."""
    gate, up = y @ w.gate.T, y @ w.up.T
    sigmoid = gate.sigmoid()
    silu = gate.mul_(sigmoid)
    d_hidden = grad @ w.head_hidden
    dw.head_hidden.addmm_(grad.T, silu * up)
    up.mul_(d_hidden)
    d_up = d_hidden.mul_(silu)
    slope = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid)  # silu' = sigmoid + silu (1 - sigmoid)
    d_gate = up.mul_(slope)
    dw.gate.addmm_(d_gate.T, y)
    dw.up.addmm_(d_up.T, y)
    return torch.mm(d_gate, w.gate).addmm_(d_up, w.up)
