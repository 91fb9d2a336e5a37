"""Triton kernels of the decoder's backward pass, over one chunk of genes of all cells.

Three kernels, in this order, none with atomics, so that two runs give bitwise equal results:

* `rows_kernel`, a program per cell and tile of genes: computes the tile again and writes what the others read (y, dx)
  and the rows of the queries' gradient, which torch sums over cells;
* `weights_kernel`, a program per block of hidden units and share of the rows: gradients of gate, up and head;
* `keys_kernel`, a program per block of tokens, head and cell: gradients of keys and values.

The last two add to sums that one program owns, chunk after chunk. Letters are those of `triton_kernels`; G is
the genes of the chunk, N = b G its rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scldm.nn.kernels.triton_kernels import attended, load_tile, normalised, scaled, scores, store_tile


@triton.jit
def hidden_gradients(
    y: tl.tensor, w_gate: tl.tensor, w_up: tl.tensor, grad: tl.tensor, row_ids: tl.tensor, head_hidden: tl.tensor,
    columns: tl.tensor, n_rows: tl.tensor, F: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the gradients before SiLU and of the other factor, and the hidden activations: each (T, BF)."""
    g = tl.dot(y, tl.trans(w_gate), input_precision=PRECISION)
    u = tl.dot(y, tl.trans(w_up), input_precision=PRECISION)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    d_hidden = tl.zeros_like(g)
    for r in tl.static_range(R):
        w = tl.load(head_hidden + r * F + columns, mask=columns < F, other=0.0).to(tl.float32)
        d_hidden += output_gradient(grad, row_ids, r, n_rows, R)[:, None] * w[None, :]
    return d_hidden * u * (sigmoid + silu * (1.0 - sigmoid)), d_hidden * silu, silu * u


@triton.jit
def output_gradient(grad: tl.tensor, rows: tl.tensor, r: tl.tensor, n_rows: tl.tensor, R: tl.constexpr):
    """Return column r of the outputs' gradient, (T,)."""
    return tl.load(grad + rows * R + r, mask=rows < n_rows, other=0.0)


@triton.jit
def rows_kernel(
    q: tl.tensor, embedding: tl.tensor, keys: tl.tensor, values: tl.tensor, norm_weight: tl.tensor,
    norm_bias: tl.tensor, gate: tl.tensor, up: tl.tensor, head_x: tl.tensor, head_hidden: tl.tensor, lse: tl.tensor,
    grad: tl.tensor, y_rows: tl.tensor, dx_rows: tl.tensor, dq_rows: tl.tensor, delta: tl.tensor, d_norm: tl.tensor,
    d_head_x: tl.tensor, eps: tl.tensor, G: tl.tensor, M: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr, BF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write y, dx and dq of every row, (b, G, D) each.

    Also writes the softmax's row sums `delta` (b, H, G), and each program's share of the gradients of the norm
    (programs, 2, D) and of the head on the residual stream (programs, R, D).
    """
    genes, cell = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1).to(tl.int64)
    program = cell * tl.num_programs(0) + tl.program_id(0)
    width = tl.arange(0, BD)
    grad += cell * G * R
    x = load_tile(embedding, genes, width, G, D, D).to(tl.float32)
    for h in range(H):
        head = cell * H + h
        q_h = load_tile(q + h * C, genes, tl.arange(0, BC), G, C, D)
        norm = tl.load(lse + head * G + genes, mask=genes < G, other=0.0)
        x = attended(x, q_h, norm, keys + head * M * C, values + head * M * D, M, D, C, BM, BC, BD, PRECISION)
    x_hat, rstd = normalised(x, eps, D, BD)
    y = scaled(x_hat, norm_weight, norm_bias, D, BD).to(gate.dtype.element_ty)
    store_tile(y_rows + cell * G * D, y, genes, width, G, D, D)

    dy = tl.zeros((T, BD), tl.float32)
    for start in range(0, F, BF):
        columns = start + tl.arange(0, BF)
        w_gate, w_up = load_tile(gate, columns, width, F, D, D), load_tile(up, columns, width, F, D, D)
        d_gate, d_up, _ = hidden_gradients(y, w_gate, w_up, grad, genes, head_hidden, columns, G, F, R, PRECISION)
        dy = tl.dot(d_gate.to(w_gate.dtype), w_gate, dy, input_precision=PRECISION)
        dy = tl.dot(d_up.to(w_up.dtype), w_up, dy, input_precision=PRECISION)

    tl.store(d_norm + program * 2 * D + width, tl.sum(dy * x_hat, 0), mask=width < D)
    tl.store(d_norm + program * 2 * D + D + width, tl.sum(dy, 0), mask=width < D)
    d_hat = dy * tl.load(norm_weight + width, mask=width < D, other=0.0).to(tl.float32)[None, :]
    along, mean = tl.sum(d_hat * x_hat, 1) / D, tl.sum(d_hat, 1) / D
    dx = tl.where((width < D)[None, :], (d_hat - mean[:, None] - x_hat * along[:, None]) * rstd[:, None], 0.0)
    for r in tl.static_range(R):
        g = output_gradient(grad, genes, r, G, R)
        tl.store(d_head_x + (program * R + r) * D + width, tl.sum(x * g[:, None], 0), mask=width < D)
        dx += g[:, None] * tl.load(head_x + r * D + width, mask=width < D, other=0.0).to(tl.float32)[None, :]
    store_tile(dx_rows + cell * G * D, dx, genes, width, G, D, D)
    query_gradients(
        q, dx.to(keys.dtype.element_ty), keys, values, lse, delta, dq_rows, genes, cell, G, M, D, H, C, T, BM, BC, BD,
        PRECISION,
    )  # fmt: skip


@triton.jit
def query_gradients(
    q: tl.tensor, dx: tl.tensor, keys: tl.tensor, values: tl.tensor, lse: tl.tensor, delta: tl.tensor,
    dq_rows: tl.tensor, genes: tl.tensor, cell: tl.tensor, G: tl.tensor, M: tl.constexpr, D: tl.constexpr,
    H: tl.constexpr, C: tl.constexpr, T: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dq and delta = sum over tokens of p dp, in two passes over the tokens: dp - delta before rounding."""
    channels, width = tl.arange(0, BC), tl.arange(0, BD)
    for h in range(H):
        head = cell * H + h
        k_h, v_h = keys + head * M * C, values + head * M * D
        q_h = load_tile(q + h * C, genes, channels, G, C, D)
        norm = tl.load(lse + head * G + genes, mask=genes < G, other=0.0)
        row_sum = tl.zeros((T,), tl.float32)
        for start in range(0, M, BM):
            tokens = start + tl.arange(0, BM)
            p = tl.exp(scores(q_h, load_tile(k_h, tokens, channels, M, C, C), tokens, M, PRECISION) - norm[:, None])
            v = load_tile(v_h, tokens, width, M, D, D)
            row_sum += tl.sum(p * tl.dot(dx, tl.trans(v), input_precision=PRECISION), 1)
        tl.store(delta + head * G + genes, row_sum, mask=genes < G)
        dq = tl.zeros((T, BC), tl.float32)
        for start in range(0, M, BM):
            tokens = start + tl.arange(0, BM)
            k = load_tile(k_h, tokens, channels, M, C, C)
            p = tl.exp(scores(q_h, k, tokens, M, PRECISION) - norm[:, None])
            dp = tl.dot(dx, tl.trans(load_tile(v_h, tokens, width, M, D, D)), input_precision=PRECISION)
            dq = tl.dot((p * (dp - row_sum[:, None])).to(k.dtype), k, dq, input_precision=PRECISION)
        store_tile(dq_rows + cell * G * D + h * C, dq, genes, channels, G, C, D)


@triton.jit
def weights_kernel(
    y_rows: tl.tensor, grad: tl.tensor, gate: tl.tensor, up: tl.tensor, head_hidden: tl.tensor,
    d_gate_up: tl.tensor, d_head_hidden: tl.tensor, N: tl.tensor, n_each: tl.tensor, D: tl.constexpr,
    F: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the chunk's share to (shares, 2, F, D) and (shares, R, F). A program takes n_each rows."""
    columns, share = tl.program_id(0) * BF + tl.arange(0, BF), tl.program_id(1)
    width, outputs = tl.arange(0, BD), tl.arange(0, BR)
    w_gate, w_up = load_tile(gate, columns, width, F, D, D), load_tile(up, columns, width, F, D, D)
    to_gate, to_up = d_gate_up + share * 2 * F * D, d_gate_up + (share * 2 + 1) * F * D
    to_head = d_head_hidden + share * R * F
    dw_gate = load_tile(to_gate, columns, width, F, D, D)
    dw_up = load_tile(to_up, columns, width, F, D, D)
    dw_head = load_tile(to_head, outputs, columns, R, F, F)
    end = tl.minimum((share + 1) * n_each, N)
    for start in range(share * n_each, end, T):
        rows = start + tl.arange(0, T)
        y = load_tile(y_rows, rows, width, end, D, D)
        d_gate, d_up, hidden = hidden_gradients(y, w_gate, w_up, grad, rows, head_hidden, columns, end, F, R, PRECISION)
        dw_gate = tl.dot(tl.trans(d_gate.to(y.dtype)), y, dw_gate, input_precision=PRECISION)
        dw_up = tl.dot(tl.trans(d_up.to(y.dtype)), y, dw_up, input_precision=PRECISION)
        for r in tl.static_range(R):
            summed = tl.sum(hidden * output_gradient(grad, rows, r, end, R)[:, None], 0)
            dw_head += tl.where((outputs == r)[:, None], summed[None, :], 0.0)
    store_tile(to_gate, dw_gate, columns, width, F, D, D)
    store_tile(to_up, dw_up, columns, width, F, D, D)
    store_tile(to_head, dw_head, outputs, columns, R, F, F)


@triton.jit
def keys_kernel(
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, lse: tl.tensor, delta: tl.tensor, dx_rows: tl.tensor,
    d_keys: tl.tensor, d_values: tl.tensor, G: tl.tensor, M: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the chunk's share to the gradients of keys (b, H, M, C) and values (b, H, M, D)."""
    tokens, h, cell = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channels, width = tl.arange(0, BC), tl.arange(0, BD)
    head = cell * H + h
    k = load_tile(keys + head * M * C, tokens, channels, M, C, C)
    v = load_tile(values + head * M * D, tokens, width, M, D, D)
    dk = load_tile(d_keys + head * M * C, tokens, channels, M, C, C)
    dv = load_tile(d_values + head * M * D, tokens, width, M, D, D)
    for start in range(0, G, T):
        genes = start + tl.arange(0, T)
        q_h = load_tile(q + h * C, genes, channels, G, C, D)
        dx = load_tile(dx_rows + cell * G * D, genes, width, G, D, D).to(k.dtype)
        norm = tl.load(lse + head * G + genes, mask=genes < G, other=float("inf"))  # weight zero beyond the last gene
        row_sum = tl.load(delta + head * G + genes, mask=genes < G, other=0.0)
        p = tl.exp(scores(q_h, k, tokens, M, PRECISION) - norm[:, None])
        dp = tl.dot(dx, tl.trans(v), input_precision=PRECISION)
        dv = tl.dot(tl.trans(p.to(k.dtype)), dx, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans((p * (dp - row_sum[:, None])).to(k.dtype)), q_h, dk, input_precision=PRECISION)
    store_tile(d_keys + head * M * C, dk, tokens, channels, M, C, C)
    store_tile(d_values + head * M * D, dv, tokens, width, M, D, D)
