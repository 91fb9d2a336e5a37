"""Attention and the gated MLP that the VAE and the DiT are made of.

Shape letters: b cells, s tokens, k context tokens, d model width, h heads, c channels per head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


def hidden_width(d_model: int, multiple_of: int) -> int:
    """Return the hidden width of the SwiGLU: 8 d / 3, rounded up to a multiple of `multiple_of`."""
    hidden = int(8 * d_model / 3)
    return multiple_of * -(-hidden // multiple_of)


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """Reshape (b, s, d) to (b, h, s, c)."""
    return x.unflatten(-1, (n_heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """Reshape (b, h, s, c) to (b, s, d)."""
    return x.transpose(-3, -2).flatten(-2)


class SwiGLU(nn.Module):
    """Gated MLP, down(silu(gate(x)) * up(x)), without biases (Shazeer 2020)."""

    def __init__(self, d_model: int, multiple_of: int):
        super().__init__()
        hidden = hidden_width(d_model, multiple_of)
        self.gate = nn.Linear(d_model, hidden, bias=False)
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to x (…, d)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SelfAttention(nn.Module):
    """Dense multi-head self-attention over a few tokens."""

    def __init__(self, d_model: int, n_heads: int, *, bias: bool):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over x (b, s, d)."""
        q, k, v = (split_heads(y, self.n_heads) for y in self.qkv(x).chunk(3, dim=-1))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class Modulation(NamedTuple):
    """Scale and shift of a norm's output, and gate of a branch's: each (b, 1, d)."""

    scale: Tensor
    shift: Tensor
    gate: Tensor | None = None


def adaln(d_model: int, n: int) -> nn.Sequential:
    """Build the network from a condition (…, d) to n modulations (…, n d)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(d_model, n * d_model))


def modulated(x: Tensor, by: Modulation | None) -> Tensor:
    """Return x scaled and shifted by a modulation; x itself if there is none."""
    return x if by is None else x * (1 + by.scale) + by.shift


def gated(x: Tensor, by: Modulation | None) -> Tensor:
    """Return x times the gate of a modulation; x itself if there is none."""
    return x if by is None or by.gate is None else x * by.gate


class SelfAttentionBlock(nn.Module):
    """Pre-norm transformer block, optionally modulated by a condition (chunks in upstream's order)."""

    def __init__(
        self, d_model: int, n_heads: int, *, bias: bool, multiple_of: int, eps: float, adaln_condition: bool = False
    ):
        super().__init__()
        self.norm_attention = nn.LayerNorm(d_model, eps=eps)
        self.attention = SelfAttention(d_model, n_heads, bias=bias)
        self.norm_mlp = nn.LayerNorm(d_model, eps=eps)
        self.mlp = SwiGLU(d_model, multiple_of)
        self.adaln = adaln(d_model, 6) if adaln_condition else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Apply the block to x (b, s, d), with condition (b, 1, d) if the block takes one."""
        attention = mlp = None
        if self.adaln is not None:
            scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = self.adaln(condition).chunk(6, dim=-1)
            attention, mlp = Modulation(scale_a, shift_a, gate_a), Modulation(scale_m, shift_m, gate_m)
        x = x + gated(self.attention(modulated(self.norm_attention(x), attention)), attention)
        return x + gated(self.mlp(modulated(self.norm_mlp(x), mlp)), mlp)
