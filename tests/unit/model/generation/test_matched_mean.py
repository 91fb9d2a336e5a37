"""A mean that is given is reached by the cells that a flow moved."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scldm.generation.draws.matched_mean import LARGEST, draw_changed, matched_factors
from scldm.metrics.genes.expression import log1p_cp10k

CELLS, GENES = 400, 60


@pytest.fixture
def cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, and means before and after a change that differs between two kinds of cells."""
    rng = np.random.default_rng(0)
    size = rng.lognormal(6, 0.4, (CELLS, 1))
    profile = rng.dirichlet(np.full(GENES, 0.6), size=2)[rng.integers(2, size=CELLS)]
    before = size * profile
    after = before * np.exp(rng.normal(0, 0.5, (1, GENES)) + rng.normal(0, 0.2, (CELLS, GENES)))
    return rng.poisson(before).astype(float), before, after


def log_mean(counts: np.ndarray) -> np.ndarray:
    return np.asarray(log1p_cp10k(sp.csr_matrix(counts)).mean(0)).ravel()


def test_changed_cells_have_the_mean_that_was_asked_for(cells):
    counts, before, after = cells
    rng = np.random.default_rng(1)
    shift = 0.4 * rng.normal(size=GENES) * (log_mean(counts) > 2)
    factors = matched_factors(sp.csr_matrix(counts), before, after, shift, rng)
    drawn = [draw_changed(counts, before, after * factors, np.random.default_rng(seed)) for seed in range(5)]
    found = np.mean([log_mean(x) for x in drawn], axis=0) - log_mean(counts)
    plain = np.mean([log_mean(draw_changed(counts, before, after, np.random.default_rng(s))) for s in range(5)], axis=0)
    seen = log_mean(counts) > 2  # the others hold almost no counts
    assert np.abs(found - shift)[seen].max() < 0.1
    assert np.abs(plain - log_mean(counts) - shift)[seen].max() > 0.5, "without factors the mean is another one"


def test_cells_that_do_not_change_need_no_factor(cells):
    counts, before, _ = cells
    factors = matched_factors(sp.csr_matrix(counts), before, before, np.zeros(GENES), np.random.default_rng(1))
    assert np.array_equal(factors, np.ones(GENES))


def test_what_distinguishes_cells_stays_the_flows(cells):
    counts, before, after = cells
    factors = matched_factors(sp.csr_matrix(counts), before, after, np.full(GENES, 0.2), np.random.default_rng(1))
    assert factors.shape == (GENES,)
    moved = np.log(after * factors) - np.log(before)
    assert np.allclose(moved - moved.mean(0), np.log(after / before) - np.log(after / before).mean(0))


def test_a_shift_that_counts_cannot_have_ends_at_the_bound(cells):
    counts, before, after = cells
    factors = matched_factors(sp.csr_matrix(counts), before, after, np.full(GENES, -50.0), np.random.default_rng(1))
    assert np.isfinite(factors).all()
    assert factors.min() >= np.exp(-LARGEST) * 0.999


def test_one_seed_gives_the_same_factors(cells):
    counts, before, after = cells
    both = [matched_factors(sp.csr_matrix(counts), before, after, np.full(GENES, 0.3), np.random.default_rng(3))
            for _ in range(2)]  # fmt: skip
    assert np.array_equal(*both)


def test_arrays_that_do_not_fit_are_refused(cells):
    counts, before, after = cells
    with pytest.raises(ValueError, match="do not fit"):
        matched_factors(sp.csr_matrix(counts), before, after, np.zeros(GENES - 1), np.random.default_rng(0))
