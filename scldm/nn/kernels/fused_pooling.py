"""Attention pooling over tables, cell by cell, with a backward pass written by hand.

An entry (cell, gene) has one row of a table: its logits for every head and query, then its values for every head. A
row of a second table, which depends on the count alone, may be added (upstream's additive inputs), the sum may be
scaled (LayerNorm's factor), and a third table may add to the logits and scale the values (count-aware pooling). Per
cell the rows are gathered into the cache, go through a softmax over the cell's entries, and are summed; the backward
pass gathers them again. Only inputs are kept. `pool_cells` on gathered rows is the plain reference.

With narrow heads one product over all heads and values, of which only the diagonal blocks are used, is faster than one
small product per head.

Shape letters: b cells, n entries of all cells, u distinct counts, m queries, h heads, c channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scldm.data.batch import require_tokens


@dataclass(frozen=True)
class PoolingEntries:
    """Rows that the cells gather."""

    genes: Tensor  # (n,) rows of the gene table
    sizes: Sequence[int]  # entries of each cell, each > 0; they sum to n
    kinds: Tensor | None = None  # (n,) rows of the count table
    log_number: Tensor | None = None  # (n,) added to all logits of an entry: the log of how many tokens it stands for


@dataclass(frozen=True)
class Heads:
    """Numbers of heads, queries and channels: how a table's columns divide."""

    n_heads: int
    n_queries: int
    channels: int

    @property
    def logits(self) -> int:
        """Columns of logits, h m."""
        return self.n_heads * self.n_queries

    @property
    def narrow(self) -> bool:
        """Whether one product over all heads is faster than one product per head."""
        return self.n_heads > 1 and self.channels < 32


def pool_tables(
    table: Tensor,
    entries: PoolingEntries,
    heads: Heads,
    *,
    scale: Tensor | None = None,
    added: Tensor | None = None,
    count_table: Tensor | None = None,
) -> Tensor:
    """Return the softmax-weighted values of each cell, (b, h, m, c).

    Args:
        table: Logits (h m) and values (h c) of each gene, (g, h m + h c).
        entries: The cells' genes.
        heads: Division of the columns.
        scale: Factor of each entry's row, (n,).
        added: Row of each distinct count that is added before the scale, (u, h m + h c).
        count_table: Bias of the logits (h m) and gain of the values (h c) of each distinct count, (u, h m + h c).
    """
    require_tokens(entries.sizes)
    return _Pool.apply(entries, heads, table, scale, added, count_table)


@dataclass(frozen=True)
class _Cell:
    """Gathered rows of one cell."""

    raw: Tensor  # (n_i, h m + h c), before the scale
    kinds: Tensor | None  # (n_i,)
    gain: Tensor | None  # (n_i, h c)
    unscaled_values: Tensor  # (n_i, h c), before the gain
    values: Tensor  # (n_i, h c)
    weights: Tensor  # (n_i, h m)


@dataclass(frozen=True)
class _Tables:
    gene: Tensor
    scale: Tensor | None
    added: Tensor | None
    count: Tensor | None


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entries: PoolingEntries, heads: Heads, *tensors: Tensor | None) -> Tensor:
        ctx.entries, ctx.heads = entries, heads
        ctx.save_for_backward(*tensors)
        tables = _Tables(*tensors)
        return torch.stack([_weighted_values(_gather(at, entries, heads, tables), heads) for at in _cells(entries)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tables, entries, heads = _Tables(*ctx.saved_tensors), ctx.entries, ctx.heads
        d_table = torch.zeros_like(tables.gene)
        d_added, d_count = (None if x is None else torch.zeros_like(x) for x in (tables.added, tables.count))
        d_scale = torch.empty_like(tables.scale) if ctx.needs_input_grad[3] and tables.scale is not None else None
        for at, cell_grad in zip(_cells(entries), grad, strict=True):
            cell = _gather(at, entries, heads, tables)
            d_weights, d_values = _product_gradients(cell, cell_grad, heads)
            d_logits = torch._softmax_backward_data(d_weights, cell.weights, 0, cell.weights.dtype)
            if d_count is not None:
                assert cell.gain is not None
                d_gain = d_values * cell.unscaled_values
                d_count.index_add_(0, cell.kinds, torch.cat([d_logits, d_gain], dim=1))
                d_values = d_values * cell.gain
            d_row = torch.cat([d_logits, d_values], dim=1)
            if tables.scale is not None:
                if d_scale is not None:
                    torch.linalg.vecdot(d_row, cell.raw, out=d_scale[at])
                d_row.mul_(tables.scale[at, None])
            if d_added is not None:
                d_added.index_add_(0, cell.kinds, d_row)
            d_table.index_add_(0, entries.genes[at], d_row)
        return None, None, d_table, d_scale, d_added, d_count


def _cells(entries: PoolingEntries) -> list[slice]:
    stops = torch.tensor([0, *entries.sizes]).cumsum(0).tolist()
    return [slice(start, stop) for start, stop in pairwise(stops)]


def _gather(at: slice, entries: PoolingEntries, heads: Heads, tables: _Tables) -> _Cell:
    raw = tables.gene.index_select(0, entries.genes[at])
    kinds = None if entries.kinds is None else entries.kinds[at]
    if tables.added is not None:
        raw.add_(tables.added.index_select(0, kinds))
    row = raw if tables.scale is None else raw * tables.scale[at, None]
    logits, values = row[:, : heads.logits], row[:, heads.logits :]
    unscaled, gain = values, None
    if tables.count is not None:
        of_count = tables.count.index_select(0, kinds)
        logits, gain = logits + of_count[:, : heads.logits], of_count[:, heads.logits :]
        values = values * gain
    if entries.log_number is not None:
        logits = logits + entries.log_number[at, None]
    return _Cell(raw, kinds, gain, unscaled, values, logits.softmax(0))


def _weighted_values(cell: _Cell, heads: Heads) -> Tensor:
    """Return the softmax-weighted values, (h, m, c)."""
    h = heads.n_heads
    if heads.narrow:
        product = (cell.weights.T @ cell.values).view(h, heads.n_queries, h, heads.channels)
        return product.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    weights = cell.weights.unflatten(1, (h, -1)).permute(1, 2, 0)  # (h, m, n)
    return weights @ cell.values.unflatten(1, (h, -1)).transpose(0, 1)


def _product_gradients(cell: _Cell, grad: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Return the gradients of the softmax weights (n, h m) and of the values (n, h c), given that of (h, m, c)."""
    h, m, c = grad.shape
    if heads.narrow:
        blocks = grad.new_zeros(h, m, h, c)
        blocks.diagonal(dim1=0, dim2=2).copy_(grad.permute(1, 2, 0))
        blocks = blocks.view(h * m, h * c)
        return cell.values @ blocks.T, cell.weights @ blocks
    values = cell.values.unflatten(1, (h, c)).transpose(0, 1)  # (h, n, c)
    weights = cell.weights.unflatten(1, (h, m)).transpose(0, 1)  # (h, n, m)
    d_weights, d_values = values @ grad.transpose(1, 2), weights @ grad
    return d_weights.transpose(0, 1).flatten(1), d_values.transpose(0, 1).flatten(1)
