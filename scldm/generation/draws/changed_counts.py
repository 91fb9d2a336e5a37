"""Apply the change of a decoder's means to measured counts: molecules are added, or lost one by one.

With mu before and mu' after the change, every molecule of a gene that falls is kept with probability mu' / mu. A gene
that rises gains molecules at the rate that its own count makes likely: a negative binomial of mean mu and inverse
dispersion theta is a Poisson whose rate is drawn from a gamma, and given x that rate is a gamma of shape theta + x and
mean mu (theta + x) / (theta + mu). So the gain is a negative binomial of mean (mu' - mu) (theta + x) / (theta + mu) and
inverse dispersion theta + x. Either way x' is NB(mu', theta) if x is NB(mu, theta), a cell keeps what the decoder does
not explain, and its library size follows. With an infinite theta the gain is a Poisson of mu' - mu.

A count is a function of (seed, streams, cell id, gene id, x, mu, mu', theta), as in `nb_draw`: most genes that rise
cost one comparison, because P(X >= 1) is at most the mean of the gain.

Shape letters: b cells, g genes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numba
import numpy as np
import scipy.sparse as sp

from scldm.generation.counter_random import MASK, SHIFT, TO_UNIT, as_cells, key_of, philox
from scldm.generation.draws.change import Change
from scldm.generation.nb_draw import (
    INVERT_TO,
    LEAST_THETA,
    LOW_WORDS,
    MOST,
    ROWS,
    _gamma,
    _inverted,
    _poisson,
    _uniforms,
)


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
def _gain(
    upper: np.uint64, mean: float, shape: float, gene: np.uint64, low: np.uint64, high: np.uint64, stream: np.uint64,
    k0: np.uint64, k1: np.uint64,
):  # fmt: skip
    """Draw molecules that are added, of a mean and an inverse dispersion `shape`; `upper` decided against none."""
    if mean <= INVERT_TO:
        lower = philox(gene, low, high, stream + LOW_WORDS, k0, k1)[0]
        v = (upper + (lower + 0.5) * TO_UNIT) * TO_UNIT
        return float(_inverted(v, mean, shape) if math.isfinite(shape) else _inverted_poisson(v, mean))
    rate, n = mean, 0
    if math.isfinite(shape):
        unit, n = _gamma(shape, gene, low, high, stream, 0, k0, k1)
        rate = unit * mean / shape
    return _poisson(rate, gene, low, high, stream, n, k0, k1)


@numba.njit(cache=True, nogil=True)
def _rows(
    counts: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    theta: np.ndarray,
    cells: np.ndarray,
    k0: np.uint64,
    k1: np.uint64,
    kept_stream: np.uint64,
    added_stream: np.uint64,
):
    """Change rows of `counts` (b, g) int32 in place; theta is (1, g) or (b, g)."""
    for row in range(counts.shape[0]):
        low, high, of = cells[row] & MASK, cells[row] >> SHIFT, row if theta.shape[0] > 1 else 0
        block = -1
        words = (np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0))
        for gene in range(counts.shape[1]):
            id_, mu, count = np.uint64(gene), float(before[row, gene]), counts[row, gene]
            mean = float(after[row, gene]) - mu
            if mean < 0.0:
                if count > 0:
                    counts[row, gene] = _kept(count, float(after[row, gene]) / mu, id_, low, high, kept_stream, k0, k1)
                continue
            shape = float(theta[of, gene])
            if math.isfinite(shape):
                mean *= (shape + count) / (shape + mu)
                shape += count
            if gene >> 2 != block:
                block = gene >> 2
                words = philox(np.uint64(block), low, high, added_stream, k0, k1)
            upper = words[gene & 3]
            if upper * TO_UNIT >= mean:  # P(X >= 1) <= mean: nothing is added
                continue
            added = _gain(upper, mean, shape, id_, low, high, added_stream, k0, k1)
            counts[row, gene] = np.int32(min(float(count) + added, MOST))


def change_counts(
    change: Change, cell_ids: Sequence[int] | np.ndarray, *, seed: int, kept_stream: int, added_stream: int
) -> sp.csr_matrix:
    """Return counts after a change of their means, CSR int32, (b, g).

    Args:
        change: Of b cells; means are taken as float32.
        cell_ids: Ids that the cells' counters use, (b,), >= 0.
        kept_stream: Stream of the molecules that are kept.
        added_stream: Stream of those that are added.
    """
    cells, key = as_cells(cell_ids), key_of(seed)
    parts = [sp.csr_matrix((0, change.counts.shape[1]), dtype=np.int32)]
    for start in range(0, len(cells), ROWS):
        at = slice(start, start + ROWS)
        part = change[at]
        changed = np.ascontiguousarray(part.counts, dtype=np.int32).copy()
        before, after, theta = (
            np.ascontiguousarray(x, dtype=np.float32) for x in (part.before, part.after, part.theta)
        )
        streams = np.uint64(kept_stream), np.uint64(added_stream)
        _rows(changed, before, after, np.maximum(theta, LEAST_THETA), cells[at], *key, *streams)
        parts.append(sp.csr_matrix(changed))
    return sp.vstack(parts, format="csr")
