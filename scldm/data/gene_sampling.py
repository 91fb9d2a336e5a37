"""Choose which genes of a cell the encoder sees: its expressed genes, all genes, a number or a share of them.

The likelihood still scores every gene: only the encoder's input is sampled. A gene that is seen without a count is an
entry of count 0; the library size stays that of the whole cell.

A gene that a cell's data set did not measure (`cells.measured`) is never seen: its zero would claim that it was.

Draws are a function of (seed, joinid, gene), so that they depend neither on the batch a cell is in nor on the number of
workers; another seed, such as the epoch's, gives another draw.

Shape letters: b cells, g genes, nnz expressed (cell, gene) pairs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from scldm.data.batch import CellBatch
from scldm.data.genes_seen import GenesSeenConfig


def see_genes(
    cells: CellBatch, config: GenesSeenConfig, *, n_genes: int, seed: int, mean_counts: Tensor | None = None
) -> CellBatch:
    """Return the cells with the entries that the encoder sees, in the order of the gene ids.

    Args:
        cells: Expressed genes of b cells.
        config: Mode and number of genes.
        n_genes: Genes of the vocabulary, g.
        seed: Seed of the draws.
        mean_counts: Mean count of each gene over the training cells, (g,), > 0; required by mode `weighted`.
    """
    if config.mode == "expressed":
        return cells
    if config.mode in ("random", "weighted", "expressed_zero") and config.n is not None and config.n > n_genes:
        raise ValueError(f"n ({config.n}) genes cannot be drawn among {n_genes}")
    if config.mode in ("random_expressed", "share_expressed"):
        keys = _uniform(cells.joinids[cells.cell_index], cells.gene_ids, seed)
        return _smallest_keys(cells, keys, config.n) if config.n else _keys_below(cells, keys, config.share or 0.0)
    dense = cells.dense(n_genes)  # (b, g)
    genes = torch.arange(n_genes, device=dense.device)
    if config.mode in ("all", "none"):
        return _from_columns(cells, dense, genes.expand_as(dense))
    keys = _uniform(cells.joinids.unsqueeze(1), genes.unsqueeze(0), seed)
    if config.mode == "expressed_zero":
        keys = keys + (dense <= 0)  # every expressed gene before every other
    elif config.mode == "weighted":
        # The n smallest of exponential times with rates w are a draw without replacement by w (Efraimidis, Spirakis).
        keys = -keys.log() / _weights(dense, mean_counts)
    if cells.measured is not None:
        keys = keys.masked_fill(~cells.measured, torch.inf)  # drawn last, and then dropped
    columns = keys.topk(config.n or 0, dim=1, largest=False, sorted=False).indices
    return _from_columns(cells, dense, columns.sort(dim=1).values)


def _weights(dense: Tensor, mean_counts: Tensor | None) -> Tensor:
    if mean_counts is None or mean_counts.shape != dense.shape[1:]:
        got = None if mean_counts is None else tuple(mean_counts.shape)
        raise ValueError(f"mode weighted needs mean_counts of shape {tuple(dense.shape[1:])}; got {got}")
    if not bool((mean_counts > 0).all()):
        raise ValueError(f"mean_counts must be > 0 for mode weighted; the smallest is {float(mean_counts.min()):g}")
    return (dense.double() + 1) / mean_counts.double()


def _from_columns(cells: CellBatch, dense: Tensor, columns: Tensor) -> CellBatch:
    """Build a batch of the same number of genes (b, s) of each cell, fewer if fewer were measured."""
    b, s = columns.shape
    if cells.measured is not None:
        known = cells.measured.gather(1, columns)
        offsets = torch.zeros_like(cells.offsets)
        offsets[1:] = known.sum(1).cumsum(0)
        return _with_entries(cells, offsets, columns[known], dense.gather(1, columns)[known])
    offsets = torch.arange(b + 1, device=columns.device) * s
    return _with_entries(cells, offsets, columns.flatten(), dense.gather(1, columns).flatten())


def _with_entries(cells: CellBatch, offsets: Tensor, gene_ids: Tensor, counts: Tensor) -> CellBatch:
    return replace(cells, offsets=offsets, gene_ids=gene_ids, counts=counts, longest=None)


def _smallest_keys(cells: CellBatch, keys: Tensor, n: int) -> CellBatch:
    """Keep the n entries of smallest key (nnz,) of each cell, or all if it has no more."""
    cell = cells.cell_index
    by_key = keys.argsort()
    order = by_key[cell[by_key].argsort(stable=True)]  # by cell, then by key
    rank = torch.arange(len(order), device=order.device) - cells.offsets[:-1][cell[order]]
    kept = order[rank < n].sort().values  # back in the order of the entries
    offsets = torch.zeros_like(cells.offsets)
    offsets[1:] = cells.lengths.clamp(max=n).cumsum(0)
    return _with_entries(cells, offsets, cells.gene_ids[kept], cells.counts[kept])


def _keys_below(cells: CellBatch, keys: Tensor, share: float) -> CellBatch:
    """Keep entries of key (nnz,) below the share, and the smallest key of each cell, so that no cell is empty."""
    smallest = keys.new_full((cells.n_cells,), torch.inf).scatter_reduce_(0, cells.cell_index, keys, "amin")
    kept = (keys < share) | (keys == smallest[cells.cell_index])
    before = torch.cat([cells.offsets.new_zeros(1), kept.cumsum(0)])
    return _with_entries(cells, before[cells.offsets], cells.gene_ids[kept], cells.counts[kept])


def _uniform(joinids: Tensor, gene_ids: Tensor, seed: int) -> Tensor:
    """Draw float64 numbers in (0, 1) of the broadcast shape: splitmix64 of (seed, joinid, gene)."""
    mixed = _splitmix(_splitmix(_splitmix(joinids.new_tensor(_signed(seed))) ^ joinids) ^ gene_ids)
    return ((mixed >> 11) & (2**53 - 1)).double().add(0.5) / 2**53


def _splitmix(x: Tensor) -> Tensor:
    """Apply splitmix64 (Steele, Lea and Flood 2014) to int64, whose products wrap around as unsigned integers do."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    """Shift right and fill with zeros; torch's shift fills with the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
