"""Counts after a shift: exact distributions, from counters of their own."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import poisson

from scldm.generation.counter_random import MASK, SHIFT, TO_UNIT, as_cells, key_of, philox
from scldm.generation.draws.shift_draw import GAINED, STAYED, shifted_counts
from scldm.generation.nb_draw import INVERT_TO, LOW_WORDS, _poisson, _uniforms

ADDED = np.array([0.0, 0.01, 0.2, 0.0, 0.0])
KEPT = np.array([1.0, 1.0, 1.0, 0.3, 0.0])
COUNTS = sp.csr_matrix(np.array([[4, 0, 7, 30, 5], [0, 1, 0, 9, 0], [2, 0, 60, 1, 1]]))


def plain(counts: np.ndarray, ids: np.ndarray, seed: int) -> np.ndarray:
    """One molecule after the other, as the words say."""
    found = counts.copy()
    key = key_of(seed)
    for row, cell in enumerate(as_cells(ids)):
        low, high = cell & MASK, cell >> SHIFT
        for gene in range(counts.shape[1]):
            if ADDED[gene] > 0:
                found[row, gene] += gained(ADDED[gene] * counts[row].sum(), gene, low, high, key)
            elif KEPT[gene] < 1:
                drawn = [_uniforms(np.uint64(gene), low, high, np.uint64(STAYED), i // 2, *key)[i % 2]
                         for i in range(counts[row, gene])]  # fmt: skip
                found[row, gene] = sum(u < KEPT[gene] for u in drawn)
    return found


def gained(rate: float, gene: int, low: np.uint64, high: np.uint64, key: tuple[np.uint64, np.uint64]) -> int:
    """A Poisson number: the inverse of its distribution at a uniform of 64 bits, or rejection if the rate is large."""
    if rate > INVERT_TO:
        return int(_poisson(rate, np.uint64(gene), low, high, np.uint64(GAINED), 0, *key))
    upper = philox(np.uint64(gene >> 2), low, high, np.uint64(GAINED), *key)[gene & 3]
    lower = philox(np.uint64(gene), low, high, np.uint64(GAINED) + LOW_WORDS, *key)[0]
    v = (upper + (lower + 0.5) * TO_UNIT) * TO_UNIT
    return next(k for k in range(1000) if poisson.sf(k, rate) <= v)


def test_counts_are_those_of_the_plain_draw():
    ids = np.array([3, 2**40, 7])
    np.testing.assert_array_equal(
        shifted_counts(COUNTS, ADDED, KEPT, ids, seed=5).toarray(), plain(COUNTS.toarray(), ids, 5)
    )


def test_a_cell_does_not_depend_on_the_others():
    ids = np.arange(300)
    many = sp.csr_matrix(np.tile(COUNTS.toarray(), (100, 1)))
    whole = shifted_counts(many, ADDED, KEPT, ids, seed=1).toarray()
    some = np.array([299, 5, 150])
    np.testing.assert_array_equal(shifted_counts(many[some], ADDED, KEPT, some, seed=1).toarray(), whole[some])
    assert (shifted_counts(many, ADDED, KEPT, ids, seed=2).toarray() != whole).any()


def test_means_and_variances_are_those_of_poisson_and_binomial_draws():
    n = 6_000
    cells = sp.csr_matrix(np.tile([4, 0, 7, 30, 5], (n, 1)))
    drawn = shifted_counts(cells, ADDED, KEPT, np.arange(n), seed=0).toarray()
    size = 46
    np.testing.assert_allclose(drawn.mean(0), [4, 0.01 * size, 7 + 0.2 * size, 9, 0], rtol=0.05)
    np.testing.assert_allclose(drawn.var(0), [0, 0.01 * size, 0.2 * size, 30 * 0.3 * 0.7, 0], rtol=0.1)


def test_a_gene_cannot_gain_and_lose_molecules():
    with pytest.raises(ValueError, match="not both"):
        shifted_counts(COUNTS, np.full(5, 0.1), np.full(5, 0.5), np.arange(3), seed=0)


def test_no_cells_give_no_cells():
    assert shifted_counts(COUNTS[:0], ADDED, KEPT, np.arange(0), seed=0).shape == (0, 5)
