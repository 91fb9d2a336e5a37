"""Assembles the entries that TileDB returns into ragged rows, in two passes and with the final types.

Convention: TileDB returns (cell, gene, count) entries, tile by tile and by cell inside a tile. Each result is turned
into a *piece*, rows in storage order, as soon as it arrives, so that its 20 bytes per entry can be freed (a piece takes
4 to 8); then the pieces' rows are copied to their final places. Rows in another order thus cost nothing extra. The
loops are compiled by numba, once per machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import DTypeLike

from pipeline.data.entries import CountEntries


class CountsChanged(ValueError):
    """A count does not fit the type that it should be stored as."""


@dataclass(frozen=True)
class Ragged:
    """Rows of the count matrix (CSR), genes ascending in a row."""

    indptr: np.ndarray  # (n + 1,) int64
    genes: np.ndarray  # (nnz,)
    counts: np.ndarray  # (nnz,)

    @property
    def row_sums(self) -> np.ndarray:
        """(n,) float32, summed in float64."""
        return _row_sums(self.indptr, self.counts)


@dataclass(frozen=True)
class PlacedEntries:
    """Entries of consecutive cells, and the row that each cell becomes."""

    first: int  # the cell that `rows` begins with
    rows: np.ndarray  # row of each cell from `first` on; -1: not requested
    entries: CountEntries  # cells and genes int64


def assemble(
    results: Iterable[PlacedEntries], n_rows: int, gene_lut: np.ndarray, *, gene_type: DTypeLike, count_type: DTypeLike
) -> Ragged:
    """Assemble rows 0 .. n_rows - 1.

    Args:
        gene_lut: Gene id of each gene; -1 drops it.
        gene_type: Type of the gene ids; wide enough for all of them.
        count_type: Type of the counts.

    Raises:
        CountsChanged: `count_type` is an integer type and a count is not whole, or is too large.
    """
    pieces, lengths = [], np.zeros(n_rows, np.int64)
    for a in results:
        e = a.entries
        ends = _row_ends(e.cells, e.genes, a.first, a.rows, gene_lut)
        genes, counts = np.empty(ends[-1], gene_type), np.empty(ends[-1], count_type)
        starts = np.concatenate([[0], ends])
        exact = _place_entries(e.cells, e.genes, e.counts, a.first, a.rows, gene_lut, starts[:-1].copy(), genes, counts)
        if not exact and np.issubdtype(count_type, np.integer):
            raise CountsChanged(f"some counts do not fit {np.dtype(count_type).name}")
        wanted = a.rows >= 0
        lengths[a.rows[wanted]] += np.diff(starts)[wanted]
        pieces.append((a.rows, starts, genes, counts))
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    genes, counts = np.empty(indptr[-1], gene_type), np.empty(indptr[-1], count_type)
    at = indptr[:-1].copy()
    while pieces:
        _copy_rows(*pieces.pop(0), at, genes, counts)
    _sort_rows(indptr, genes, counts)
    return Ragged(indptr, genes, counts)


@numba.njit(cache=True, nogil=True)
def _row_ends(cells, genes, first, rows, lut):
    """Return where each cell's kept entries end if they lie one after the other."""
    ends = np.zeros(len(rows), np.int64)
    for k in range(len(cells)):
        cell = cells[k] - first
        if rows[cell] >= 0 and lut[genes[k]] >= 0:
            ends[cell] += 1
    total = 0
    for cell in range(len(rows)):
        total += ends[cell]
        ends[cell] = total
    return ends


@numba.njit(cache=True, nogil=True)
def _place_entries(cells, genes, counts, first, rows, lut, at, out_genes, out_counts):
    """Copy entries to their cells, in the order in which they arrive; return False if a count changed on the way."""
    exact = True
    for k in range(len(cells)):
        cell = cells[k] - first
        gene = lut[genes[k]]
        if rows[cell] >= 0 and gene >= 0:
            place = at[cell]
            at[cell] = place + 1
            out_genes[place] = gene
            out_counts[place] = counts[k]
            exact &= out_counts[place] == counts[k]
    return exact


@numba.njit(cache=True, nogil=True)
def _copy_rows(rows, starts, genes, counts, at, out_genes, out_counts):
    """Append a piece's rows to what earlier pieces gave of them."""
    for cell in range(len(rows)):
        row = rows[cell]
        if row >= 0:
            place, start, n = at[row], starts[cell], starts[cell + 1] - starts[cell]
            out_genes[place : place + n] = genes[start : start + n]
            out_counts[place : place + n] = counts[start : start + n]
            at[row] = place + n


@numba.njit(cache=True, nogil=True)
def _sort_rows(indptr, genes, counts):
    """Sort by gene, so that a row is the same however TileDB filled its buffers; most rows arrive sorted."""
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        for k in range(start + 1, stop):
            if genes[k] < genes[k - 1]:
                order = np.argsort(genes[start:stop], kind="mergesort")
                genes[start:stop] = genes[start:stop][order]
                counts[start:stop] = counts[start:stop][order]
                break


@numba.njit(cache=True, nogil=True)
def _row_sums(indptr, counts):
    sums = np.empty(len(indptr) - 1, np.float32)
    for row in range(len(sums)):
        total = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            total += counts[k]
        sums[row] = total
    return sums
