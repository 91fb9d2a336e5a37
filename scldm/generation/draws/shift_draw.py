"""Draw the counts of cells after a shift that adds and removes molecules, each gene of a cell from its own counter.

A count is a function of (seed, stream, cell id, gene, count, shift) and does not depend on other cells or genes. A gene
that rises gains a Poisson number of molecules; of a gene that falls each molecule stays with a probability.

Shape letters: b cells, g genes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import scipy.sparse as sp

from scldm.generation.counter_random import MASK, SHIFT, as_cells, key_of
from scldm.generation.nb_draw import MOST, ROWS, _poisson, _uniforms

SHIFTED = 24  # stream of a cell's randomness; those of other draws are in `real_cells`


@numba.njit(cache=True, nogil=True)
def _stayed(
    n: np.int64, kept: float, gene: np.uint64, low: np.uint64, high: np.uint64, stream: np.uint64,
    k0: np.uint64, k1: np.uint64,
):  # fmt: skip
    """Draw how many of n molecules stay: one uniform for each."""
    left = 0
    for i in range((n + 1) // 2):
        a, b = _uniforms(gene, low, high, stream, i, k0, k1)
        left += int(a < kept)
        if 2 * i + 1 < n:
            left += int(b < kept)
    return left


@numba.njit(cache=True, nogil=True)
def _rows(
    counts: np.ndarray, added: np.ndarray, kept: np.ndarray, cells: np.ndarray, k0: np.uint64, k1: np.uint64,
    stream: np.uint64,
):  # fmt: skip
    """Change counts (b, g) in place."""
    for row in range(counts.shape[0]):
        low, high, size = cells[row] & MASK, cells[row] >> SHIFT, float(counts[row].sum())
        for gene in range(counts.shape[1]):
            id_, n = np.uint64(gene), counts[row, gene]
            if n > 0 and kept[gene] < 1.0:
                n = _stayed(n, kept[gene], id_, low, high, stream, k0, k1)
            elif added[gene] > 0.0 and size > 0.0:
                n += int(min(_poisson(added[gene] * size, id_, low, high, stream, 0, k0, k1), MOST))
            counts[row, gene] = n


def shifted_counts(
    counts: sp.csr_matrix,
    added: np.ndarray,
    kept: np.ndarray,
    cell_ids: Sequence[int] | np.ndarray,
    *,
    seed: int,
    stream: int = SHIFTED,
) -> sp.csr_matrix:
    """Return the counts of b cells after a shift, (b, g) CSR int32.

    Args:
        counts: Counts of the cells, (b, g).
        added: Expected molecules that are added for each count of the cell, (g,), >= 0.
        kept: Probability that a molecule stays, (g,); 1 where molecules are added.
        cell_ids: Ids that the cells' counters use, (b,), >= 0.

    Raises:
        ValueError: A gene both gains and loses molecules.
    """
    if ((added > 0) & (kept < 1)).any():
        raise ValueError("a gene either gains molecules (added > 0) or loses them (kept < 1), not both")
    b, g = counts.shape
    cells, key = as_cells(cell_ids), key_of(seed)
    parts = [sp.csr_matrix((0, g), dtype=np.int32)]
    for start in range(0, b, ROWS):
        dense = np.rint(counts[start : start + ROWS].toarray()).astype(np.int64)
        _rows(dense, added.astype(np.float64), kept.astype(np.float64), cells[start : start + ROWS], *key,
              np.uint64(stream))  # fmt: skip
        parts.append(sp.csr_matrix(dense.astype(np.int32)))
    return sp.vstack(parts, format="csr")
