"""Reconstruction scores, the space fitted on real cells, baselines and the comparison of two sets."""

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA

from scldm.metrics.baselines import LabelBaseline, halves, select_like
from scldm.metrics.compare import CellSet, CompareSettings, compare
from scldm.metrics.expression import log1p_cp10k
from scldm.metrics.projection import RealSpace
from scldm.metrics.reconstruction import correlations, reconstruction_scores

N_GENES = 40


def cells(n: int, seed: int, *, scale: float = 1.0) -> CellSet:
    """Two types; each has its own half of the genes high. `scale` multiplies five genes of middling expression."""
    rng = np.random.default_rng(seed)
    types = np.arange(n) % 2
    rate = np.where((np.arange(N_GENES) % 2) == types[:, None], 6.0, 1.0) * np.linspace(0.2, 2, N_GENES)
    rate[:, 20:25] *= scale
    labels = np.array(["even", "odd"], dtype=object)[types]
    return CellSet(sp.csr_matrix(rng.poisson(rate * rng.lognormal(0, 0.3, (n, 1)))), {"type": labels})


def test_correlations_equal_numpy_and_leave_constant_genes_out():
    x, y = np.random.default_rng(0).random((2, 30, 4))
    x[:, 2] = 0.1
    r, excluded = correlations(x, y)
    assert excluded == 1
    np.testing.assert_allclose(r, [np.corrcoef(x[:, g], y[:, g])[0, 1] for g in (0, 1, 3)])


def test_perfect_reconstruction_scores_one():
    counts = cells(20, 0).counts
    scores = reconstruction_scores(counts, counts.toarray() * 3, np.arange(20.0))
    assert (scores.gene_pearson, scores.cell_pearson) == pytest.approx((1, 1))
    assert scores.mse == pytest.approx(0)
    assert scores.nll == 9.5


def test_a_nan_likelihood_is_an_error_not_a_mean_over_the_rest():
    counts = cells(20, 0).counts
    with pytest.raises(ValueError, match="1 of 20 cells are not"):
        reconstruction_scores(counts, counts.toarray(), np.r_[np.nan, np.ones(19)])


def test_projection_is_centred_pca_of_the_most_variable_genes():
    train, other = cells(120, 0).counts, cells(30, 1).counts
    space = RealSpace.fit(train, n_top_genes=10, n_pcs=3, seed=0)
    x = log1p_cp10k(train).toarray()
    assert set(space.genes) == set(np.argsort(-x.var(0))[:10])
    pca = PCA(3, svd_solver="full").fit(x[:, space.genes])
    expected = pca.transform(log1p_cp10k(other).toarray()[:, space.genes])
    np.testing.assert_allclose(np.abs(space.project(other)), np.abs(expected), atol=1e-6)
    np.testing.assert_allclose(space.project(train).mean(0), 0, atol=1e-9)


def test_space_refuses_too_many_components_and_other_genes():
    train = cells(120, 0).counts
    with pytest.raises(ValueError, match=r"n_pcs \(10\) must be below"):
        RealSpace.fit(train, n_top_genes=10, n_pcs=10, seed=0)
    with pytest.raises(ValueError, match="fitted on 40 genes; got cells with 7"):
        RealSpace.fit(train, n_top_genes=10, n_pcs=3, seed=0).project(train[:, :7])


def test_poisson_baseline_has_the_mean_and_the_library_sizes_of_its_label():
    train = cells(400, 0)
    fitted = LabelBaseline.fit(train.counts, train.labels["type"])
    drawn = fitted.poisson(np.array(["odd"] * 3000, dtype=object), np.random.default_rng(0)).toarray()
    own = train.counts[train.labels["type"] == "odd"].toarray()
    np.testing.assert_allclose(drawn.mean(0), own.mean(0), rtol=0.12)
    given = drawn.sum(1)
    # Totals are Poisson around a drawn library size: Var = E[L] + Var(L).
    assert given.var() == pytest.approx(own.sum(1).mean() + own.sum(1).var(), rel=0.12)


def test_moments_recover_the_dispersion_of_a_negative_binomial():
    rng = np.random.default_rng(0)
    mean, theta = 8.0, 2.0
    counts = rng.poisson(rng.gamma(theta, mean / theta, (4000, 30)))
    # Library sizes vary with the counts themselves, by 1/30: theta is recovered up to that.
    fitted = LabelBaseline.fit(sp.csr_matrix(counts), np.array(["a"] * 4000, dtype=object)).table["a"].theta
    assert fitted.mean() == pytest.approx(theta, rel=0.15)


def test_negative_binomial_baseline_is_wider_than_poisson():
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(0.5, 4, (500, 20))))
    labels = np.array(["a"] * 500, dtype=object)
    fitted = LabelBaseline.fit(counts, labels)
    variance = {d.__name__: d(labels, rng).toarray().var(0).mean() for d in (fitted.poisson, fitted.negative_binomial)}
    real = counts.toarray().var(0).mean()
    assert abs(variance["negative_binomial"] - real) < 0.3 * real
    assert variance["poisson"] < 0.6 * real


def test_halves_are_disjoint_and_equal():
    a, b = halves(11, np.random.default_rng(0))
    assert (len(a), len(b), len({*a, *b})) == (5, 5, 10)


def test_selection_has_the_wanted_composition_and_names_what_is_short():
    available = np.array(["a"] * 10 + ["b"] * 2)
    selection = select_like(available, np.array(["a", "a", "b", "b", "b"]), np.random.default_rng(0))
    assert sorted(available[selection.indices]) == ["a", "a", "b", "b"]
    assert selection.short == {"b": 1}


def test_floor_is_nearer_than_a_shifted_set_on_every_distance():
    real, floor, shifted, reference = cells(200, 1), cells(200, 2), cells(200, 3, scale=12), cells(400, 4)
    space = RealSpace.fit(reference.counts, n_top_genes=30, n_pcs=5, seed=0)
    settings = CompareSettings(n_neighbors=5, transport_cells=150, seed=0)
    near, far = (compare(real, c, reference=reference, space=space, settings=settings) for c in (floor, shifted))
    assert near.keys() == far.keys()
    for name, score in near.items():
        if score.group == "distance":
            assert score.value < far[name].value, name
    assert near["label_accuracy.type"].value > 0.95
    assert near["gene_mean_r2"].value > 0.9 > far["gene_mean_r2"].value
    assert abs(near["auroc"].value - 0.5) < 0.1 < far["auroc"].value - 0.5
