"""Counts that follow a change of means: molecules are kept one by one, or added as a cell's own count makes likely."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from scldm.generation.counter_random import philox
from scldm.generation.draws.change import Change
from scldm.generation.draws.changed_counts import change_counts
from scldm.generation.nb_draw import INVERT_TO

STREAMS = {"kept_stream": 24, "added_stream": 25}


def changed(counts, before, after, ids=None, seed=3, theta=np.inf):
    counts, before, after = (np.asarray(x, np.float32) for x in (counts, before, after))
    ids = np.arange(len(counts)) if ids is None else ids
    theta = np.broadcast_to(np.float32(theta), (1, counts.shape[1])) if np.ndim(theta) < 2 else theta
    return change_counts(Change(counts, before, after, theta), ids, seed=seed, **STREAMS).toarray()


def plain(counts, before, after, ids, seed, theta=None):
    """The same, one gene of one cell after the other, with SciPy's distributions."""
    word = lambda *c: philox(*(np.uint64(x) for x in (*c, seed, 0)))  # noqa: E731
    out = np.array(counts, dtype=np.int64)
    for row, id_ in enumerate(ids):
        for gene in range(out.shape[1]):
            mu, new = float(np.float32(before[row][gene])), float(np.float32(after[row][gene]))
            if new < mu:
                kept = 0
                for molecule in range(int(out[row, gene])):
                    w = [int(x) for x in word(gene, id_, 0, 24 + (2 << 8) + ((molecule // 2) << 12))]
                    high, low = (w[0], w[1]) if molecule % 2 == 0 else (w[2], w[3])
                    kept += (((high << 21) ^ (low >> 11)) + 0.5) * 2.0**-53 < new / mu
                out[row, gene] = kept
            else:
                upper = int(word(gene // 4, id_, 0, 25)[gene % 4])
                lower = int(word(gene, id_, 0, 25 + (1 << 8))[0])
                v = (upper + (lower + 0.5) * 2.0**-32) * 2.0**-32
                law, k = stats.poisson(new - mu), 0
                if theta is not None:
                    own, x = float(np.float32(theta[gene])), out[row, gene]
                    mean = (new - mu) * (own + x) / (own + mu)
                    law = stats.nbinom(own + x, (own + x) / (own + x + mean))
                while law.sf(k) > v:
                    k += 1
                out[row, gene] += k
    return out


def test_every_count_is_that_of_the_plain_reference():
    rng = np.random.default_rng(0)
    counts = rng.poisson(3.0, (20, 9))
    before, after = rng.gamma(1.0, 3.0, (2, 20, 9))
    after[:, 0], before[:, 1], counts[:, 1] = 0, 0, 0
    ids = np.arange(100, 120)
    np.testing.assert_array_equal(changed(counts, before, after, ids), plain(counts, before, after, ids, seed=3))


def test_every_count_of_overdispersed_genes_is_that_of_the_plain_reference():
    rng = np.random.default_rng(1)
    counts, theta = rng.poisson(2.0, (20, 9)), 0.5 + rng.gamma(1.0, 2.0, 9)
    before, after = 0.5 + rng.gamma(1.0, 1.5, (2, 20, 9))
    change = Change(counts, before, after, theta[None])
    assert change.gain.max() < INVERT_TO, "larger ones are drawn by rejection, which has no plain form"
    ids = np.arange(100, 120)
    found = changed(counts, before, after, ids, theta=theta)
    np.testing.assert_array_equal(found, plain(counts, before, after, ids, seed=3, theta=theta))
    assert (found != changed(counts, before, after, ids)).any(), "theta matters"


@pytest.mark.parametrize("ratio", [0.3, 1.5, 8.0])
@pytest.mark.parametrize(("mean", "theta"), [(0.4, 0.5), (3.0, 2.0), (60.0, 4.0)])
def test_a_negative_binomial_stays_one_with_the_new_mean(mean, theta, ratio):
    n, mean, theta = 40_000, float(np.float32(mean)), float(np.float32(theta))
    x = np.random.default_rng(0).negative_binomial(theta, theta / (theta + mean), (n, 1))
    found = changed(x, np.full((n, 1), mean), np.full((n, 1), ratio * mean), theta=theta)[:, 0]
    law = stats.nbinom(theta, theta / (theta + ratio * mean))
    edges = np.unique(law.ppf(np.linspace(0.02, 0.98, 20)).astype(int))
    expected = np.diff(np.concatenate([[0], law.cdf(edges), [1]])) * n
    seen = np.histogram(found, np.concatenate([[-0.5], edges + 0.5, [np.inf]]))[0]
    assert stats.chisquare(seen, expected).pvalue > 1e-4


def test_inverse_dispersions_of_each_cell_are_used():
    rng = np.random.default_rng(2)
    counts, theta = rng.poisson(3.0, (70, 5)), rng.gamma(1.0, 2.0, (70, 5)).astype(np.float32)
    before, after = rng.gamma(1.0, 3.0, (2, 70, 5))
    whole = changed(counts, before, after, theta=theta)
    for row in (0, 69):
        one = changed(counts[[row]], before[[row]], after[[row]], [row], theta=theta[row])
        np.testing.assert_array_equal(one, whole[[row]])


def test_arrays_of_a_change_that_do_not_fit_are_refused_by_name():
    fine = np.ones((3, 2))
    with pytest.raises(ValueError, match=r"do not fit: counts \(3, 2\).*theta \(2, 2\)"):
        Change(fine, fine, fine, np.ones((2, 2)))


def test_an_unchanged_mean_changes_no_count():
    counts = np.random.default_rng(0).poisson(3.0, (7, 5))
    np.testing.assert_array_equal(changed(counts, np.full((7, 5), 2.0), np.full((7, 5), 2.0)), counts)


def test_a_gene_without_mean_loses_all_molecules():
    assert not changed([[5, 900]], [[1, 2]], [[0, 0]]).any()


@pytest.mark.parametrize("rate", [0.01, 0.5, 5.0, 15.9, 16.1, 300.0])
def test_with_an_infinite_theta_what_is_added_is_a_poisson(rate):
    n = 40_000
    x = changed(np.full((n, 1), 4), np.full((n, 1), 1.0), np.full((n, 1), 1.0 + rate))[:, 0] - 4
    law = stats.poisson(np.float32(1.0 + rate) - 1.0)
    edges = np.unique(law.ppf(np.linspace(0.02, 0.98, 20)).astype(int))
    expected = np.diff(np.concatenate([[0], law.cdf(edges), [1]])) * n
    assert stats.chisquare(np.histogram(x, np.concatenate([[-0.5], edges + 0.5, [np.inf]]))[0], expected).pvalue > 1e-4


def test_what_is_kept_is_a_binomial_of_the_cell_s_own_count():
    n = 40_000
    x = changed(np.full((n, 1), 9), np.full((n, 1), 4.0), np.full((n, 1), 1.0))[:, 0]
    expected = stats.binom(9, 0.25).pmf(np.arange(10)) * n
    seen = np.bincount(x, minlength=10)
    assert (
        stats.chisquare(np.append(seen[:7], seen[7:].sum()), np.append(expected[:7], expected[7:].sum())).pvalue > 1e-4
    )


def test_a_cell_does_not_depend_on_the_others():
    rng = np.random.default_rng(1)
    counts, (before, after) = rng.poisson(3.0, (100, 6)), rng.gamma(1.0, 3.0, (2, 100, 6))
    whole = changed(counts, before, after)
    some = [70, 3]
    np.testing.assert_array_equal(changed(counts[some], before[some], after[some], some), whole[some])
    assert (changed(counts, before, after, seed=4) != whole).any()


def test_an_inverse_dispersion_that_underflows_adds_nothing_to_a_zero():
    found = changed([[0, 4]], [[0.0, 1.0]], [[2.0, 3.0]], theta=np.zeros(2))
    assert found[0, 0] == 0
    assert found[0, 1] >= 4
