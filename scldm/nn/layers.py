"""Attention and the gated MLP that the VAE and the DiT are made of.

Shape letters: b cells, s tokens, k context tokens, d model width, h heads, c channels per head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def hidden_width(d_model: int, multiple_of: int) -> int:
    """Hidden width of the SwiGLU: 8 d / 3, rounded up to a multiple."""
    hidden = int(8 * d_model / 3)
    return multiple_of * -(-hidden // multiple_of)


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """(b, s, d) -> (b, h, s, c)"""
    return x.unflatten(-1, (n_heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """(b, h, s, c) -> (b, s, d)"""
    return x.transpose(-3, -2).flatten(-2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (Shazeer 2020)."""

    def __init__(self, d_model: int, multiple_of: int):
        super().__init__()
        hidden = hidden_width(d_model, multiple_of)
        self.gate = nn.Linear(d_model, hidden, bias=False)
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SelfAttention(nn.Module):
    """Dense multi-head self-attention over a few tokens."""

    def __init__(self, d_model: int, n_heads: int, *, bias: bool):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(y, self.n_heads) for y in self.qkv(x).chunk(3, dim=-1))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class SelfAttentionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, d_model: int, n_heads: int, *, bias: bool, multiple_of: int, eps: float):
        super().__init__()
        self.norm_attention = nn.LayerNorm(d_model, eps=eps)
        self.attention = SelfAttention(d_model, n_heads, bias=bias)
        self.norm_mlp = nn.LayerNorm(d_model, eps=eps)
        self.mlp = SwiGLU(d_model, multiple_of)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))
