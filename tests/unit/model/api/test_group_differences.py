"""The test of two groups, matched library sizes, and the error of a model's fold change, on drawn numbers."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scldm.api.analysis.differential import count_sums
from scldm.api.analysis.fold_error import squared_distance
from scldm.api.analysis.group_test import GroupSums, draw_groupings, of_given, p_values
from scldm.api.analysis.matched_sizes import matched_sizes, thinned

G = 200


def cells(n, rng, *, depth=1000.0, rates=None):
    """Counts of cells whose library sizes and rates vary, (n, G)."""
    rates = np.exp(np.random.default_rng(7).normal(0, 1.5, G)) if rates is None else rates
    size = depth * rng.lognormal(0, 0.4, (n, 1))
    return rng.poisson(size * rates / rates.sum() * rng.gamma(2, 1 / 2, (n, G)))


def p_of(x, first, seed=0, n=499):
    """P-values at matched library sizes, as `Model.differential_expression`."""
    rng, sizes = np.random.default_rng(seed), x.sum(1).astype(float)
    kept = matched_sizes(sizes, first)
    counts = thinned(sp.csr_matrix(x, dtype=np.float32), kept, rng)
    return p_values(count_sums(counts, kept.astype(float), draw_groupings(first, n, rng)))


@pytest.mark.parametrize(("n1", "n2", "depth"), [(60, 60, 1.0), (10, 150, 1.0), (60, 60, 0.25), (20, 80, 4.0)])
def test_genes_that_do_not_differ_are_found_no_more_often_than_is_said(n1, n2, depth):
    found = []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        x = np.concatenate([cells(n1, rng, depth=1000 * depth), cells(n2, rng)])
        found.append(p_of(x, np.arange(n1 + n2) < n1, seed))
    p = np.stack(found)
    assert (p <= 0.05).mean() < 0.058, "25 x 200 p-values: 0.003 is their standard deviation"
    assert (p <= 0.001).mean() < 0.003
    assert (p <= 0.05).mean() > 0.02, "nor is the test so careful that it finds nothing"


def test_genes_that_differ_are_found_and_the_others_stay():
    rng = np.random.default_rng(1)
    rates = np.exp(np.random.default_rng(7).normal(0, 1.5, G))
    common = np.argsort(rates)[-60:-20]
    moved = rates.copy()
    moved[common[:20]] *= 2.0
    moved[common[20:]] *= (rates[common].sum() - moved[common[:20]].sum()) / rates[common[20:]].sum()
    others = np.setdiff1d(np.arange(G), common)
    x = np.concatenate([cells(150, rng, rates=moved), cells(150, rng, rates=rates)])
    p = p_of(x, np.arange(300) < 150)
    assert (p[common[:20]] < 1e-3).mean() > 0.8
    assert (p[others] < 0.05).mean() < 0.1


def test_the_means_are_all_molecules_of_a_gene_over_all_molecules():
    x = cells(30, np.random.default_rng(2))
    first = np.arange(30) < 12
    found = of_given(count_sums(sp.csr_matrix(x, dtype=np.float32), x.sum(1).astype(float), first[None]))
    np.testing.assert_allclose(found.mean1, 1e4 * x[:12].sum(0) / x[:12].sum())
    np.testing.assert_allclose(found.mean2, 1e4 * x[12:].sum(0) / x[12:].sum())


def test_sums_do_not_depend_on_the_chunks_and_means_have_the_usual_variance():
    y = np.random.default_rng(3).normal(5, 2, (20, 7))
    first = np.arange(20) % 3 == 0
    whole, parts = (GroupSums(first[None], 7, weighted=False) for _ in range(2))
    whole.add(0, y)
    for start in range(0, 20, 6):
        parts.add(start, y[start : start + 6])
    mean1, variance1, mean2, variance2 = parts.means()
    np.testing.assert_allclose(mean1, whole.means()[0])
    np.testing.assert_allclose(mean2[0], y[~first].mean(0))
    np.testing.assert_allclose(variance1[0], y[first].var(0, ddof=1) / first.sum())
    np.testing.assert_allclose(variance2[0], y[~first].var(0, ddof=1) / (~first).sum())


def test_a_gene_that_nobody_expresses_has_a_p_value_of_one():
    x = cells(40, np.random.default_rng(4))
    x[:, 5] = 0
    assert p_of(x, np.arange(40) < 20)[5] == 1


def test_a_small_group_without_a_count_is_not_certain():
    rng = np.random.default_rng(5)
    x = cells(300, rng)
    x[:, 0] = 0
    x[100:140, 0] = 1  # 40 of 300 cells; a group of 10 has none with a probability of 0.23
    assert p_of(x, np.arange(300) < 10)[0] > 0.1


def test_matched_groups_have_the_same_library_sizes_and_only_lose_molecules():
    rng = np.random.default_rng(6)
    x = sp.csr_matrix(np.concatenate([cells(50, rng, depth=4000.0), cells(80, rng)]), dtype=np.float32)
    first, sizes = np.arange(130) < 50, np.asarray(x.sum(1)).ravel()
    kept = matched_sizes(sizes, first)
    assert (kept <= sizes).all()
    levels = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(kept[first], levels), np.quantile(kept[~first], levels), rtol=0.1)
    thin = thinned(x, kept, np.random.default_rng(0))
    np.testing.assert_array_equal(np.asarray(thin.sum(1)).ravel(), kept)
    assert ((x - thin).toarray() >= 0).all()
    unchanged = np.flatnonzero(kept == sizes)
    assert len(unchanged)
    assert (thin[unchanged] != x[unchanged]).nnz == 0


@pytest.mark.parametrize("followed", [0.0, 0.25, 0.5])
def test_the_error_of_a_model_covers_what_it_gets_wrong(followed):
    """As long as it follows at most half of the noise of the gene's own counts."""
    rng = np.random.default_rng(8)
    truth, mean = rng.normal(0, 1, 2000), np.exp(rng.normal(2, 1.5, 2000))
    shrunk = mean / (mean + 1)
    noise, own = (shrunk * rng.normal(0, s, 2000) for s in (0.6, 0.3))
    model = truth + own + followed * noise
    se = np.sqrt(squared_distance(model, truth + noise, mean))
    assert (abs(model - truth) < 1.96 * se).mean() > 0.94
