"""Reconstruction scores, the space fitted on real cells, baselines and the comparison of two sets."""

import numpy as np
import pytest
import scipy.sparse as sp
from helpers.models.metric_cells import cells, comparison
from sklearn.decomposition import PCA

from scldm.metrics.baselines import LabelBaseline, Pools, halves, select_like, shuffled
from scldm.metrics.cell_set import CellSet
from scldm.metrics.distribution.projection import RealSpace, most_variable
from scldm.metrics.genes.expression import log1p_cp10k
from scldm.metrics.genes.reconstruction import correlations, reconstruction_scores, reconstruction_table, zero_accuracy
from scldm.metrics.resampling import Halves


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


def test_selection_has_the_wanted_composition_and_reports_shortfalls():
    available = np.array(["a"] * 10 + ["b"] * 2)
    selection = select_like(available, np.array(["a", "a", "b", "b", "b"]), np.random.default_rng(0))
    assert sorted(available[selection.indices]) == ["a", "a", "b", "b"]
    assert selection.short == {"b": 1}


def test_floor_is_nearer_than_a_shifted_set_on_every_distance():
    real, floor, shifted, reference = cells(200, 1), cells(200, 2), cells(200, 3, scale=12), cells(400, 4)
    found = comparison(real, reference).all_scores({"floor": floor, "shifted": shifted})
    near, far = found["floor"].scores, found["shifted"].scores
    assert near.keys() == far.keys()
    for name, score in near.items():
        if score.group == "distance" or name.startswith(("conditional_w", "conditional_m", "conditional_f")):
            assert score.value < far[name].value, name
    assert near["label_accuracy.type"].value > 0.95
    assert near["gene_mean_r2"].value > 0.9 > far["gene_mean_r2"].value
    assert abs(near["auroc"].value - 0.5) < 0.1 < far["auroc"].value - 0.5


def test_genes_of_seurat_v3_are_those_of_scanpy():
    import scanpy as sc
    from anndata import AnnData

    rng = np.random.default_rng(0)
    rate = rng.lognormal(-1, 1.5, 400) * rng.gamma(rng.uniform(0.3, 3, 400), size=(300, 400))
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.float64))
    theirs = sc.pp.highly_variable_genes(AnnData(counts), flavor="seurat_v3", n_top_genes=60, inplace=False)
    ours = most_variable(counts, 60, "seurat_v3")
    assert ours.tolist() == np.flatnonzero(theirs["highly_variable"].to_numpy()).tolist()
    assert ours.tolist() != most_variable(counts, 60, "variance").tolist()


def test_baselines_take_the_combination_of_labels_and_the_first_label_where_that_is_rare():
    labels = {
        "type": np.array(["a"] * 40 + ["b"] * 10, dtype=object),
        "day": np.array(["1"] * 30 + ["2"] * 20, dtype=object),
    }
    reference = CellSet(sp.csr_matrix(np.ones((50, 3))), labels)
    cell_labels = {
        "type": np.array(["a", "a", "b", "c"], dtype=object),
        "day": np.array(["1", "2", "2", "2"], dtype=object),
    }
    pools = Pools.like(reference, CellSet(sp.csr_matrix(np.ones((4, 3))), cell_labels), ["type", "day"])
    members = [pools.members[name].tolist() for name in pools.wanted]
    assert members == [list(range(30)), list(range(40)), list(range(40, 50)), list(range(50))]
    drawn = pools.draw(np.random.default_rng(0))
    assert all(cell in pool for cell, pool in zip(drawn, members, strict=True))


def test_no_training_cell_is_used_twice_before_all_were_used():
    labels = np.array(["a"] * 6, dtype=object)
    reference, matched = (CellSet(sp.csr_matrix(np.ones((n, 2))), {"type": labels[:n]}) for n in (4, 6))
    taken = Pools.like(reference, matched, ["type"]).draw_each_once(np.random.default_rng(0))
    assert sorted(taken[:4]) == [0, 1, 2, 3]


def test_shuffled_genes_keep_their_values_in_each_class_and_nothing_else():
    real = cells(300, 0)
    types = real.labels["type"]
    drawn = shuffled(real.counts, types, np.random.default_rng(0))
    for name in ("even", "odd"):
        a, b = (np.sort(m[types == name].toarray(), axis=0) for m in (real.counts, drawn))
        np.testing.assert_array_equal(a, b)
    size = [np.asarray(m.sum(1)).ravel().std() for m in (real.counts, drawn)]
    assert size[1] < 0.6 * size[0]  # the cells' own library sizes are gone


def test_reconstruction_on_draws_agrees_with_numpy_and_lies_below_that_on_means():
    rng = np.random.default_rng(0)
    mu = rng.gamma(2.0, 2.0, (80, 12))
    counts, draws = (sp.csr_matrix(rng.poisson(mu)) for _ in range(2))
    halves = Halves.draw(np.full(80, "", dtype=object), 10, rng)
    table = reconstruction_table(counts, mu, halves, refits=5, nll=np.arange(80.0), draws=draws)
    x, y = (log1p_cp10k(m).toarray() for m in (counts, draws))
    by_gene = np.mean([np.corrcoef(x[:, g], y[:, g])[0, 1] for g in range(12)])
    assert table["reconstruction_gene_pearson_draws"].value == pytest.approx(by_gene)
    assert table["reconstruction_mse_draws"].value == pytest.approx(((x - y) ** 2).mean())
    assert table["reconstruction_gene_pearson"].value > by_gene
    plain = reconstruction_scores(counts, mu, np.arange(80.0))
    assert table["reconstruction_cell_pearson"].value == pytest.approx(plain.cell_pearson)
    assert table["reconstruction_nll"].value == 39.5
    assert all(np.isfinite(score.half_width) for score in table.values())


def test_zero_accuracy_counts_zeros_and_non_zeros_in_place():
    a, b = np.array([[0, 1, 2, 0]]), np.array([[0, 5, 0, 3]])
    assert zero_accuracy(sp.csr_matrix(a), sp.csr_matrix(b)).tolist() == [0.5]
