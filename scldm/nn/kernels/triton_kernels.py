"""Triton kernels of the decoder's last block: a program holds a tile of genes of one cell, whole rows of width d.

Only `triton_decoder` imports this module, and only at a launch: it needs triton. The backward kernels are in
`triton_gradients` and compute a tile again with the functions below.

Sums are fp32. A product takes its operands in the type of the queries, so bf16 runs on tensor cores; softmax,
LayerNorm and SiLU are fp32 always. Widths that are no power of two are masked: padding loads as zero and stays zero.

Shape letters are those of `fused_decoder`: G genes, M tokens, D width, H heads, C channels per head, F hidden
width, R outputs; T, BM, BC, BD, BF are the block sizes of genes, tokens, channels, width and hidden width.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(
    pointer: tl.tensor, rows: tl.tensor, columns: tl.tensor, n_rows: tl.tensor, n_columns: tl.tensor,
    stride: tl.tensor,
):  # fmt: skip
    """Load rows x columns of a row-major matrix; zeros beyond its edges."""
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(
    pointer: tl.tensor, value: tl.tensor, rows: tl.tensor, columns: tl.tensor, n_rows: tl.tensor,
    n_columns: tl.tensor, stride: tl.tensor,
):  # fmt: skip
    """Store rows x columns of a row-major matrix; nothing beyond its edges."""
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], value, mask=inside)


@triton.jit
def scores(q: tl.tensor, k: tl.tensor, tokens: tl.tensor, M: tl.constexpr, PRECISION: tl.constexpr):
    """Return the products of queries and keys, (T, BM); tokens beyond the last one get weight zero."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    return tl.where((tokens < M)[None, :], s, float("-inf"))


@triton.jit
def log_normaliser(
    q: tl.tensor, keys: tl.tensor, T: tl.constexpr, M: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return log sum exp of one head's scores over the tokens, (T,), computed a block of tokens at a time."""
    channels = tl.arange(0, BC)
    peak = tl.full((T,), float("-inf"), tl.float32)
    total = tl.zeros((T,), tl.float32)
    for start in range(0, M, BM):
        tokens = start + tl.arange(0, BM)
        s = scores(q, load_tile(keys, tokens, channels, M, C, C), tokens, M, PRECISION)
        higher = tl.maximum(peak, tl.max(s, 1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(s - higher[:, None]), 1)
        peak = higher
    return peak + tl.log(total)


@triton.jit
def attended(
    x: tl.tensor, q: tl.tensor, lse: tl.tensor, keys: tl.tensor, values: tl.tensor, M: tl.constexpr,
    D: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return x (T, BD) plus one head's attention; the output projection is in the values."""
    channels, width = tl.arange(0, BC), tl.arange(0, BD)
    for start in range(0, M, BM):
        tokens = start + tl.arange(0, BM)
        s = scores(q, load_tile(keys, tokens, channels, M, C, C), tokens, M, PRECISION)
        v = load_tile(values, tokens, width, M, D, D)
        x = tl.dot(tl.exp(s - lse[:, None]).to(v.dtype), v, x, input_precision=PRECISION)
    return x


@triton.jit
def normalised(x: tl.tensor, eps: tl.tensor, D: tl.constexpr, BD: tl.constexpr):
    """Return the LayerNorm without its affine part, (T, BD), and one over the standard deviation, (T,)."""
    centred = tl.where((tl.arange(0, BD) < D)[None, :], x - (tl.sum(x, 1) / D)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def scaled(x_hat: tl.tensor, norm_weight: tl.tensor, norm_bias: tl.tensor, D: tl.constexpr, BD: tl.constexpr):
    """Apply the affine part of the LayerNorm."""
    width = tl.arange(0, BD)
    weight = tl.load(norm_weight + width, mask=width < D, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias + width, mask=width < D, other=0.0).to(tl.float32)
    return x_hat * weight[None, :] + bias[None, :]


@triton.jit
def decode_kernel(
    q: tl.tensor, embedding: tl.tensor, keys: tl.tensor, values: tl.tensor, norm_weight: tl.tensor,
    norm_bias: tl.tensor, gate: tl.tensor, up: tl.tensor, head_x: tl.tensor, head_hidden: tl.tensor,
    head_bias: tl.tensor, out: tl.tensor, lse: tl.tensor, eps: tl.tensor, G: tl.tensor, M: tl.constexpr,
    D: tl.constexpr, H: tl.constexpr, C: tl.constexpr, F: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write outputs (b, G, R) and log normalisers of the attention (b, H, G); a program per cell and tile."""
    genes, cell = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1).to(tl.int64)
    width, outputs = tl.arange(0, BD), tl.arange(0, BR)
    x = load_tile(embedding, genes, width, G, D, D).to(tl.float32)
    for h in range(H):
        q_h = load_tile(q + h * C, genes, tl.arange(0, BC), G, C, D)
        k_h, v_h = keys + (cell * H + h) * M * C, values + (cell * H + h) * M * D
        norm = log_normaliser(q_h, k_h, T, M, C, BM, BC, PRECISION)
        tl.store(lse + (cell * H + h) * G + genes, norm, mask=genes < G)
        x = attended(x, q_h, norm, k_h, v_h, M, D, C, BM, BC, BD, PRECISION)
    x_hat, _ = normalised(x, eps, D, BD)
    y = scaled(x_hat, norm_weight, norm_bias, D, BD).to(gate.dtype.element_ty)

    total = tl.zeros((T, BR), tl.float32) + tl.load(head_bias + outputs, mask=outputs < R, other=0.0)[None, :]
    for r in tl.static_range(R):
        w_x = tl.load(head_x + r * D + width, mask=width < D, other=0.0).to(tl.float32)
        total += tl.where((outputs == r)[None, :], tl.sum(x * w_x[None, :], 1)[:, None], 0.0)
    for start in range(0, F, BF):
        hidden_columns = start + tl.arange(0, BF)
        g = tl.dot(y, tl.trans(load_tile(gate, hidden_columns, width, F, D, D)), input_precision=PRECISION)
        u = tl.dot(y, tl.trans(load_tile(up, hidden_columns, width, F, D, D)), input_precision=PRECISION)
        hidden = g * tl.sigmoid(g) * u
        for r in tl.static_range(R):
            w_h = tl.load(head_hidden + r * F + hidden_columns, mask=hidden_columns < F, other=0.0).to(tl.float32)
            total += tl.where((outputs == r)[None, :], tl.sum(hidden * w_h[None, :], 1)[:, None], 0.0)
    store_tile(out + cell * G * R, total, genes, outputs, G, R, R)
