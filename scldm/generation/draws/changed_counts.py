"""Apply the change of a decoder's means to measured counts: molecules are added, or lost one by one.

With mu before and mu' after the change, a gene that rises gains a Poisson of mu' - mu molecules, and every molecule of
a gene that falls is kept with probability mu' / mu. So E[x'] is mu' if E[x] is mu, a cell keeps what the decoder does
not explain, and its library size follows.

A count is a function of (seed, streams, cell id, gene id, x, mu, mu'), as in `nb_draw`: most genes that rise cost one
comparison, because P(X >= 1) <= mu' - mu.

Shape letters: b cells, g genes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numba
import numpy as np
import scipy.sparse as sp

from scldm.generation.counter_random import MASK, SHIFT, TO_UNIT, as_cells, key_of, philox
from scldm.generation.nb_draw import INVERT_TO, LOW_WORDS, MOST, ROWS, _poisson, _uniforms


@numba.njit(cache=True, nogil=True)
def _kept(
    count: int, ratio: float, gene: np.uint64, low: np.uint64, high: np.uint64, stream: np.uint64, k0: np.uint64,
    k1: np.uint64,
):  # fmt: skip
    """Keep each of `count` molecules with probability `ratio`; return how many are kept."""
    kept = 0
    for pair in range((count + 1) // 2):
        u, v = _uniforms(gene, low, high, stream, pair, k0, k1)
        kept += int(u < ratio)
        if 2 * pair + 1 < count:
            kept += int(v < ratio)
    return kept


@numba.njit(cache=True, nogil=True)
def _inverted_poisson(v: float, rate: float):
    """Return the smallest k with P(X > k) <= v."""
    above, p, k = -math.expm1(-rate), math.exp(-rate), 0
    while v < above and (p > 1e-19 or k < rate):
        k += 1
        p *= rate / k
        above -= p
    return k


@numba.njit(cache=True, nogil=True)
def _rows(
    counts: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    cells: np.ndarray,
    k0: np.uint64,
    k1: np.uint64,
    kept_stream: np.uint64,
    added_stream: np.uint64,
):
    """Change rows of `counts` (b, g) int32 in place."""
    for row in range(counts.shape[0]):
        low, high = cells[row] & MASK, cells[row] >> SHIFT
        block = -1
        words = (np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0))
        for gene in range(counts.shape[1]):
            id_, rate = np.uint64(gene), float(after[row, gene]) - float(before[row, gene])
            if rate < 0.0:
                if counts[row, gene] > 0:
                    ratio = float(after[row, gene]) / float(before[row, gene])
                    counts[row, gene] = _kept(counts[row, gene], ratio, id_, low, high, kept_stream, k0, k1)
                continue
            if gene >> 2 != block:
                block = gene >> 2
                words = philox(np.uint64(block), low, high, added_stream, k0, k1)
            upper = words[gene & 3]
            if upper * TO_UNIT >= rate:  # P(X >= 1) <= rate: nothing is added
                continue
            if rate <= INVERT_TO:
                lower = philox(id_, low, high, added_stream + LOW_WORDS, k0, k1)[0]
                added = float(_inverted_poisson((upper + (lower + 0.5) * TO_UNIT) * TO_UNIT, rate))
            else:
                added = _poisson(rate, id_, low, high, added_stream, 0, k0, k1)
            counts[row, gene] = np.int32(min(float(counts[row, gene]) + added, MOST))


def change_counts(
    counts: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    cell_ids: Sequence[int] | np.ndarray,
    *,
    seed: int,
    kept_stream: int,
    added_stream: int,
) -> sp.csr_matrix:
    """Return counts after a change of their means, CSR int32, (b, g).

    Args:
        counts: Measured counts, (b, g) whole numbers >= 0.
        before: Means before the change, (b, g) float32, finite and >= 0.
        after: Means after it.
        cell_ids: Ids that the cells' counters use, (b,), >= 0.
        kept_stream: Stream of the molecules that are kept.
        added_stream: Stream of those that are added.
    """
    if not counts.shape == before.shape == after.shape:
        raise ValueError(f"counts, before and after differ in shape: {counts.shape}, {before.shape}, {after.shape}")
    cells, key = as_cells(cell_ids), key_of(seed)
    parts = [sp.csr_matrix((0, counts.shape[1]), dtype=np.int32)]
    for start in range(0, len(counts), ROWS):
        at = slice(start, start + ROWS)
        changed = np.ascontiguousarray(counts[at], dtype=np.int32).copy()
        _rows(changed, before[at], after[at], cells[at], *key, np.uint64(kept_stream), np.uint64(added_stream))
        parts.append(sp.csr_matrix(changed))
    return sp.vstack(parts, format="csr")
