"""A mean that is given is reached by the cells that a flow moved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from scldm.generation.draws.change import Change
from scldm.generation.draws.changed_counts import change_counts
from scldm.generation.draws.matched_mean import LARGEST, draw_changed, matched_factors
from scldm.metrics.genes.expression import log1p_cp10k

CELLS, GENES = 400, 60


@pytest.fixture(params=[np.inf, 1.5], ids=["poisson", "negative binomial"])
def cells(request) -> Change:
    """Counts, and means before and after a change that differs between two kinds of cells."""
    rng = np.random.default_rng(0)
    size = rng.lognormal(6, 0.4, (CELLS, 1))
    profile = rng.dirichlet(np.full(GENES, 0.6), size=2)[rng.integers(2, size=CELLS)]
    before = size * profile
    after = before * np.exp(rng.normal(0, 0.5, (1, GENES)) + rng.normal(0, 0.2, (CELLS, GENES)))
    spread = rng.gamma(request.param, 1 / request.param, before.shape) if np.isfinite(request.param) else 1.0
    return Change(rng.poisson(before * spread).astype(float), before, after, np.full((1, GENES), request.param))


def log_mean(counts: np.ndarray) -> np.ndarray:
    return np.asarray(log1p_cp10k(sp.csr_matrix(counts)).mean(0)).ravel()


def test_changed_cells_have_the_mean_that_was_asked_for(cells):
    rng, own = np.random.default_rng(1), log_mean(cells.counts)
    shift = 0.4 * rng.normal(size=GENES) * (own > 2)
    factors = matched_factors(cells, shift, rng)
    drawn = [draw_changed(cells.times(factors), np.random.default_rng(seed)) for seed in range(5)]
    found = np.mean([log_mean(x) for x in drawn], axis=0) - own
    plain = np.mean([log_mean(draw_changed(cells, np.random.default_rng(s))) for s in range(5)], axis=0)
    seen = own > 2  # the others hold almost no counts
    assert np.abs(found - shift)[seen].max() < 0.1
    assert np.abs(plain - own - shift)[seen].max() > 0.5, "without factors the mean is another one"


def test_the_plain_draw_and_the_counted_one_have_the_same_distribution(cells):
    some = cells[np.arange(40)]
    plain = np.mean([draw_changed(some, np.random.default_rng(s)) for s in range(200)], axis=0)
    streams = {"kept_stream": 1, "added_stream": 2}
    counted = np.mean([change_counts(some, range(40), seed=s, **streams).toarray() for s in range(200)], axis=0)
    scale = np.sqrt((some.after + some.after**2 / np.minimum(cells.theta, 1e9)) / 100 + 1e-3)
    assert np.abs((plain - counted) / scale).mean() < 1.0
    assert abs(plain.sum() / counted.sum() - 1) < 0.01


def test_cells_that_do_not_change_need_no_factor(cells):
    same = replace(cells, after=cells.before)
    assert np.array_equal(matched_factors(same, np.zeros(GENES), np.random.default_rng(1)), np.ones(GENES))


def test_what_distinguishes_cells_stays_the_flows(cells):
    factors = matched_factors(cells, np.full(GENES, 0.2), np.random.default_rng(1))
    assert factors.shape == (GENES,)
    moved, flows = (np.log(x.after) - np.log(x.before) for x in (cells.times(factors), cells))
    assert np.allclose(moved - moved.mean(0), flows - flows.mean(0))


def test_a_shift_that_counts_cannot_have_ends_at_the_bound(cells):
    factors = matched_factors(cells, np.full(GENES, -50.0), np.random.default_rng(1))
    assert np.isfinite(factors).all()
    assert factors.min() >= np.exp(-LARGEST) * 0.999


def test_one_seed_gives_the_same_factors(cells):
    both = [matched_factors(cells, np.full(GENES, 0.3), np.random.default_rng(3)) for _ in range(2)]
    assert np.array_equal(*both)


def test_a_shift_of_other_genes_is_refused(cells):
    with pytest.raises(ValueError, match="do not fit"):
        matched_factors(cells, np.zeros(GENES - 1), np.random.default_rng(0))
