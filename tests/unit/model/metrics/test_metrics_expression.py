"""Gene and cell statistics against NumPy and scikit-learn."""

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.metrics import r2_score

from scldm.metrics.genes import expression as ex


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    return sp.csr_matrix(rng.negative_binomial(1, 0.4, (90, 25)) * (rng.random((90, 25)) < 0.5))


def test_log1p_cp10k_is_the_textbook_formula(counts):
    dense = counts.toarray()
    np.testing.assert_allclose(ex.log1p_cp10k(counts).toarray(), np.log1p(dense / dense.sum(1, keepdims=True) * 1e4))


def test_a_cell_without_counts_stays_zero():
    assert not ex.log1p_cp10k(np.array([[0, 0], [1, 0]])).toarray()[0].any()


def test_negative_and_infinite_counts_are_refused():
    with pytest.raises(ValueError, match="negative; the smallest is -1"):
        ex.as_counts(np.array([[-1.0, 2]]))
    with pytest.raises(ValueError, match="finite; 1 entries"):
        ex.as_counts(np.array([[np.nan, 2]]))


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_streamed_moments_equal_one_shot(counts, rows):
    x = ex.log1p_cp10k(counts).toarray()
    moments = ex.gene_moments(ex.chunks(counts, rows))
    np.testing.assert_allclose(moments.mean, x.mean(0))
    np.testing.assert_allclose(moments.variance, x.var(0, ddof=1))
    np.testing.assert_array_equal(moments.zero_fraction, (x == 0).mean(0))


def test_variance_survives_a_large_mean():
    x = sp.csr_matrix(1e9 + np.array([[0.0], [1], [2], [3]]))
    moments = ex.gene_moments(ex.chunks(x, 2), log_normalise=False)
    np.testing.assert_allclose(moments.variance, [5 / 3])


def test_r2_is_that_of_scikit_learn_and_sees_a_scale_that_correlation_does_not():
    rng = np.random.default_rng(1)
    real = rng.random(50)
    generated = real + 0.1 * rng.random(50)
    assert ex.r2_identity(real, generated) == pytest.approx(r2_score(real, generated))
    assert ex.pearson_squared(real, generated) == pytest.approx(np.corrcoef(real, generated)[0, 1] ** 2)
    assert ex.pearson_squared(real, 3 * real) == pytest.approx(1)
    assert ex.r2_identity(real, 3 * real) < 0


def test_agreement_leaves_out_genes_silent_in_both(counts):
    padded = sp.hstack([counts, sp.csr_matrix((90, 500))], format="csr")
    half = [ex.gene_moments([c[:45]]) for c in (counts, padded)], [ex.gene_moments([c[45:]]) for c in (counts, padded)]
    without, with_silent = (ex.gene_statistics_agreement(a, b) for a, b in zip(*half, strict=True))
    assert without == pytest.approx(with_silent)


def test_zero_fraction_counts_stored_zeros_as_zeros():
    x = sp.csr_matrix((np.array([0.0, 3]), ([0, 1], [0, 1])), shape=(2, 2))
    assert ex.zero_fraction(x) == 0.75
    assert ex.genes_per_cell(x).tolist() == [0, 1]
    assert ex.library_sizes(x).tolist() == [0, 3]


def test_ks_is_the_largest_gap():
    assert ex.ks_statistic(np.array([1, 2, 3, 4]), np.array([3, 4, 5, 6])) == 0.5


def test_moments_and_ks_of_halves_are_those_of_the_cells_in_them(counts):
    chosen = np.random.default_rng(0).random((4, 90)) < 0.5
    weights = chosen / chosen.sum(1, keepdims=True)
    found = ex.weighted_gene_moments(ex.log1p_cp10k(counts), weights)
    size = ex.library_sizes(counts)
    ks = ex.weighted_ks(size, size[:30] + 3, weights, np.full((4, 30), 1 / 30))
    for rows, moments, gap in zip(chosen, found, ks, strict=True):
        direct = ex.gene_moments([counts[rows]])
        np.testing.assert_allclose(moments.mean, direct.mean)
        np.testing.assert_allclose(moments.m2, direct.m2, atol=1e-9)
        np.testing.assert_array_equal(moments.n_zero, direct.n_zero)
        assert gap == pytest.approx(ex.ks_statistic(size[rows], size[:30] + 3))
