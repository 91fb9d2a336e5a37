"""Attention of a few queries over the expressed genes of each cell, at the cost of the expressed genes only.

Keys and values are *per-gene tables*. That is exact for upstream's multiplicative inputs, because LayerNorm(f E_g)
with a count factor f is s (E_g - mean E_g) * weight + bias with the scalar s = f / sqrt(f^2 var(E_g) + eps): a count
only scales the gene's row. It is also how the count-aware input is built: there a count adds to the logit and scales
the value.

Shape letters: b cells, n expressed entries of all cells, g genes, m queries, d model width, h heads, c channels per
head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GeneTables:
    """What attention needs of every gene, computed once per batch."""

    scores: Tensor  # (g, h, m): query . key, without the count
    values: Tensor  # (g, h, c), without the count
    variance: Tensor  # (g,), of the gene's embedding over d


def gene_tables(
    embedding: Tensor, queries: Tensor, *, norm: nn.LayerNorm, key_value: nn.Linear, n_heads: int
) -> tuple[GeneTables, Tensor]:
    """Tables of (E - mean E) * weight, and the constant part of the values.

    Args:
        embedding: Gene embeddings, (g, d).
        queries: Projected queries, (h, m, c).

    Returns:
        The tables and the constant part of the values, (h, c). The constant part of the keys is the same for every
        entry of a softmax and cancels.
    """
    variance, mean = torch.var_mean(embedding, dim=-1, correction=0, keepdim=True)
    weight_k, weight_v = key_value.weight.chunk(2)
    rows = (embedding - mean) * norm.weight
    keys = (rows @ weight_k.T).unflatten(-1, (n_heads, -1))  # (g, h, c)
    scores = torch.einsum("ghc,hmc->ghm", keys, queries) / math.sqrt(queries.shape[-1])
    values = (rows @ weight_v.T).unflatten(-1, (n_heads, -1))
    constant = norm.bias @ weight_v.T
    if key_value.bias is not None:
        constant = constant + key_value.bias.chunk(2)[1]
    return GeneTables(scores, values, variance.squeeze(-1)), constant.unflatten(-1, (n_heads, -1))


def joint_table(
    embedding: Tensor, queries: Tensor, *, norm: nn.LayerNorm, key_value: nn.Linear, n_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and values of `gene_tables` side by side, (g, h m + h c), for `scldm.nn.fused_pooling`.

    Centring, weight, key projection and queries are one (d, h m + h c) matrix, so that the table is one product.

    Returns:
        The table, the variance of each embedding over d, (g,), and the constant part of the values, (h, c).
    """
    weight_k, weight_v = key_value.weight.chunk(2)
    folded = torch.einsum("hcd,hmc->dhm", weight_k.unflatten(0, (n_heads, -1)), queries).flatten(1)
    folded = torch.cat([folded / math.sqrt(queries.shape[-1]), weight_v.T], dim=1) * norm.weight[:, None]
    centred = embedding - embedding.mean(-1, keepdim=True)
    constant = norm.bias @ weight_v.T
    if key_value.bias is not None:
        constant = constant + key_value.bias.chunk(2)[1]
    return centred @ folded, centred.square().mean(-1), constant.unflatten(-1, (n_heads, -1))


@dataclass(frozen=True)
class PadToken:
    """Upstream's unmasked pads: n identical tokens of a cell are one token with log(n) added to its logit."""

    logits: Tensor  # (h, m)
    values: Tensor  # (h, c)
    numbers: Sequence[int]  # pads of each cell


def pool_cells(logits: Tensor, values: Tensor, lengths: Sequence[int], *, pad: PadToken | None = None) -> Tensor:
    """Softmax-weighted sum of values over each cell's entries: (b, h, m, c).

    Args:
        logits: (n, h, m).
        values: (n, h, c).
        lengths: Entries of each cell; they sum to n.
        pad: Only for models of upstream.
    """
    pooled = []
    for i, (cell_logits, cell_values) in enumerate(zip(logits.split(lengths), values.split(lengths), strict=True)):
        if pad is not None and pad.numbers[i] > 0:
            cell_logits = torch.cat([cell_logits, (pad.logits + math.log(pad.numbers[i]))[None]])
            cell_values = torch.cat([cell_values, pad.values[None]])
        weights = cell_logits.permute(1, 2, 0).softmax(-1)  # (h, m, n)
        pooled.append(weights @ cell_values.transpose(0, 1))
    return torch.stack(pooled)


def pool_padded(logits: Tensor, values: Tensor, lengths: Tensor, cell_index: Tensor) -> Tensor:
    """The same as `pool_cells` without pads, in a few large operations: for accelerators. (b, h, m, c)"""
    longest, n_cells = int(lengths.max()), len(lengths)
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(cell_index), device=lengths.device) - starts[cell_index]
    padded = logits.new_full((n_cells, longest, *logits.shape[1:]), float("-inf"))
    padded[cell_index, place] = logits
    padded_values = values.new_zeros(n_cells, longest, *values.shape[1:])
    padded_values[cell_index, place] = values
    return torch.einsum("bnhm,bnhc->bhmc", padded.softmax(1), padded_values)
