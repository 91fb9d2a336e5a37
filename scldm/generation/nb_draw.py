"""Draw sparse counts from the negative binomial, each from its own counter.

A count is a function of (seed, stream, cell id, gene id, mu, theta) and does not depend on other genes or cells. The
distribution is exact, and most genes cost one comparison: with v uniform in [0, 1) the count is 0 if and only if v >=
P(X >= 1), and P(X >= 1) <= E[X] = mu, so v >= mu decides without a logarithm. 32 bits of v are drawn for four genes
together; the lower 32 bits only if v < mu. Otherwise the distribution function is inverted by summation (mu <=
INVERT_TO), or a gamma rate and a Poisson are drawn (larger mu).

Shape letters: b cells, g genes, p genes that are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import scipy.sparse as sp

from scldm.generation.counter_random import MASK, SHIFT, TO_UNIT, as_cells, key_of, philox

INVERT_TO = 16.0  # mu: above it the walk along the distribution function is longer than two rejections
LOW_WORDS, SEQUENCE = np.uint64(1 << 8), np.uint64(2 << 8)  # sub-streams, combined with the stream's number
ROWS = 64  # cells of a scratch block: b g numbers are never held twice
MOST = float(2**31 - 1)
LEAST_THETA = 1e-30  # of a network whose exponential underflows: a count is then 0, but for a chance that is not seen


@numba.njit(cache=True, nogil=True)
def _uniforms(
    gene: np.uint64, low: np.uint64, high: np.uint64, stream: np.uint64, n: int, k0: np.uint64, k1: np.uint64
):
    """Return the n-th pair of uniforms in (0, 1) of a gene of a cell, with 53 bits."""
    w0, w1, w2, w3 = philox(gene, low, high, stream + SEQUENCE + (np.uint64(n) << np.uint64(12)), k0, k1)
    a = ((w0 << np.uint64(21)) ^ (w1 >> np.uint64(11))) + 0.5
    b = ((w2 << np.uint64(21)) ^ (w3 >> np.uint64(11))) + 0.5
    return a * 2.0**-53, b * 2.0**-53


@numba.njit(cache=True, nogil=True)
def _inverted(v: float, mu: float, theta: float):
    """Return the smallest k with P(X > k) <= v."""
    log_zero = -theta * math.log1p(mu / theta)
    above = -math.expm1(log_zero)  # P(X > 0)
    p, k, ratio = math.exp(log_zero), 0, mu / (mu + theta)
    while v < above and (p > 1e-19 or k < mu):  # beyond, what is left is less than v can tell
        p *= (k + theta) / (k + 1.0) * ratio
        k += 1
        above -= p
    return k


@numba.njit(cache=True, nogil=True)
def _gamma(
    shape: float,
    gene: np.uint64,
    low: np.uint64,
    high: np.uint64,
    stream: np.uint64,
    n: int,
    k0: np.uint64,
    k1: np.uint64,
):
    """Draw a gamma variable of unit scale (Marsaglia and Tsang 2000); also returns the next free n."""
    boost, a = 1.0, shape
    if a < 1.0:
        u, _ = _uniforms(gene, low, high, stream, n, k0, k1)
        n += 1
        boost, a = u ** (1.0 / a), a + 1.0
    d = a - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        u, angle = _uniforms(gene, low, high, stream, n, k0, k1)
        x = math.sqrt(-2.0 * math.log(u)) * math.cos(2.0 * math.pi * angle)
        u, _ = _uniforms(gene, low, high, stream, n + 1, k0, k1)
        n += 2
        cube = (1.0 + c * x) ** 3
        if cube > 0.0 and math.log(u) < 0.5 * x * x + d * (1.0 - cube + math.log(cube)):
            return boost * d * cube, n


@numba.njit(cache=True, nogil=True)
def _poisson(
    rate: float,
    gene: np.uint64,
    low: np.uint64,
    high: np.uint64,
    stream: np.uint64,
    n: int,
    k0: np.uint64,
    k1: np.uint64,
):
    """Draw a Poisson variable: by inversion, or from 10 on by transformed rejection (Hörmann 1993, PTRS)."""
    if rate < 10.0:
        u, _ = _uniforms(gene, low, high, stream, n, k0, k1)
        p, k = math.exp(-rate), 0.0
        while u > p and k < 1000.0:
            u -= p
            k += 1.0
            p *= rate / k
        return k
    b = 0.931 + 2.53 * math.sqrt(rate)
    a = -0.059 + 0.02483 * b
    inverse_alpha, v_r = 1.1239 + 1.1328 / (b - 3.4), 0.9277 - 3.6224 / (b - 2.0)
    while True:
        u, v = _uniforms(gene, low, high, stream, n, k0, k1)
        n += 1
        u -= 0.5
        us = 0.5 - abs(u)
        k = math.floor((2.0 * a / us + b) * u + rate + 0.43)
        if us >= 0.07 and v <= v_r:
            return k
        if k < 0.0 or (us < 0.013 and v > us):
            continue
        log_accept = math.log(v * inverse_alpha / (a / (us * us) + b))
        if log_accept <= -rate + k * math.log(rate) - math.lgamma(k + 1.0):
            return k


@numba.njit(cache=True, nogil=True)
def _rows(
    mu: np.ndarray,
    theta: np.ndarray,
    genes: np.ndarray,
    cells: np.ndarray,
    k0: np.uint64,
    k1: np.uint64,
    stream: np.uint64,
    out_gene: np.ndarray,
    out_count: np.ndarray,
    n_out: np.ndarray,
):
    """Draw rows; `out_gene` and `out_count` (b, p) hold a row's non-zeros first, `n_out` (b,) how many."""
    for row in range(mu.shape[0]):
        low, high, of = cells[row] & MASK, cells[row] >> SHIFT, row if theta.shape[0] > 1 else 0
        found, block = 0, np.int64(-1)
        words = (np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0))
        for place in range(len(genes)):
            gene = genes[place]
            if gene >> 2 != block:
                block = gene >> 2
                words = philox(np.uint64(block), low, high, stream, k0, k1)
            upper, mean = words[gene & 3], float(mu[row, gene])
            if upper * TO_UNIT >= mean:  # P(X >= 1) <= mean: a zero
                continue
            id_, shape = np.uint64(gene), float(theta[of, gene])
            if mean <= INVERT_TO:
                lower = philox(id_, low, high, stream + LOW_WORDS, k0, k1)[0]
                count = float(_inverted((upper + (lower + 0.5) * TO_UNIT) * TO_UNIT, mean, shape))
            else:
                rate, n = _gamma(shape, id_, low, high, stream, 0, k0, k1)
                count = _poisson(rate * mean / shape, id_, low, high, stream, n, k0, k1)
            if count > 0.0:
                out_gene[row, found], out_count[row, found] = place, int(min(count, MOST))
                found += 1
        n_out[row] = found


def draw_counts(
    mu: np.ndarray,
    theta: np.ndarray,
    cell_ids: Sequence[int] | np.ndarray,
    *,
    seed: int,
    stream: int,
    genes: np.ndarray | None = None,
    pool: ThreadPoolExecutor | None = None,
) -> sp.csr_matrix:
    """Draw the counts of b cells, CSR int32, (b, p); column j is gene `genes[j]`.

    Args:
        mu: Means, (b, g) float32, finite and >= 0.
        theta: Inverse dispersions, (g,) or (b, g), > 0.
        cell_ids: Ids that the cells' counters use, (b,), >= 0.
        genes: Ids of the genes to draw, increasing; None: all.
        pool: Threads that share the cells; the result does not depend on them.
    """
    b, g = mu.shape
    genes = np.arange(g) if genes is None else np.asarray(genes, dtype=np.int64)
    rows_of_theta = np.maximum(np.ascontiguousarray(theta, dtype=np.float32), LEAST_THETA).reshape(-1, g)
    cells, key = as_cells(cell_ids), key_of(seed)

    def draw(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = slice(start, min(start + ROWS, b))
        n = at.stop - start
        gene, count = np.empty((n, len(genes)), np.int32), np.empty((n, len(genes)), np.int32)
        found = np.zeros(n, np.int64)
        own = rows_of_theta if len(rows_of_theta) == 1 else rows_of_theta[at]
        _rows(mu[at], own, genes, cells[at], *key, np.uint64(stream), gene, count, found)
        kept = np.arange(len(genes)) < found[:, None]
        return gene[kept], count[kept], found

    parts = list((map if pool is None else pool.map)(draw, range(0, b, ROWS)))
    if not parts:
        return sp.csr_matrix((0, len(genes)), dtype=np.int32)
    gene, count, found = (np.concatenate(x) for x in zip(*parts, strict=True))
    return sp.csr_matrix((count, gene, np.concatenate([[0], found.cumsum()])), shape=(b, len(genes)))
