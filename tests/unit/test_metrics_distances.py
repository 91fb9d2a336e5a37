"""Distances against closed forms, SciPy and scikit-learn."""

import itertools

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import energy_distance as scipy_energy
from scipy.stats import wasserstein_distance
from sklearn.metrics.pairwise import rbf_kernel

from scldm.metrics import distances as d


@pytest.fixture
def clouds():
    rng = np.random.default_rng(0)
    return rng.normal(size=(130, 4)), rng.normal(size=(110, 4)) @ rng.normal(size=(4, 4)) + 0.5


def test_frechet_of_diagonal_gaussians_is_its_closed_form():
    a, b = np.array([1.0, 4.0]), np.array([9.0, 1.0])
    value = d.frechet_gaussians(np.zeros(2), np.diag(a), np.array([3.0, 4.0]), np.diag(b))
    assert value == pytest.approx(25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())


def test_frechet_agrees_with_the_matrix_root_of_the_product(clouds):
    x, y = clouds
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real)
    assert d.frechet_distance(x, y) == pytest.approx(expected)
    assert d.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_survives_a_singular_covariance():
    x = np.random.default_rng(0).normal(size=(5, 1)) * np.ones((1, 3))
    assert d.frechet_distance(x, x + 1) == pytest.approx(3)


def test_mmd_agrees_with_scikit_learn_kernels(clouds):
    x, y = clouds
    kernel = lambda a, b: sum(rbf_kernel(a, b, gamma=1 / (2 * s**2)) for s in d.CFGEN_SIGMAS).mean()  # noqa: E731
    assert d.mmd2_rbf(x, y) == pytest.approx(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))


def test_median_bandwidth_comes_from_real_points_only(clouds):
    x, y = clouds
    pairs = [np.linalg.norm(a - b) for a, b in itertools.combinations(x, 2)]
    assert d.median_distance(x) == pytest.approx(np.median(pairs))
    assert d.mmd2_median(x, y) == pytest.approx(d.mmd2_rbf(x, y, (np.median(pairs),)))


def test_energy_distance_in_one_dimension_is_scipy_squared():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=70), rng.exponential(size=90)
    assert d.energy_distance(x[:, None], y[:, None]) == pytest.approx(scipy_energy(x, y) ** 2)


def test_wasserstein_in_one_dimension_matches_sorted_points():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=80), rng.exponential(size=80)
    w = {p: d.wasserstein(x[:, None], y[:, None], power=p, max_points=80, rng=rng) for p in (1, 2)}
    assert w[1] == pytest.approx(wasserstein_distance(x, y))
    assert w[2] == pytest.approx(np.sqrt(((np.sort(x) - np.sort(y)) ** 2).mean()))


def test_wasserstein_of_a_shift_is_the_shift_and_follows_its_generator(clouds):
    x, y = clouds
    w2 = lambda b, n, seed: d.wasserstein(x, b, power=2, max_points=n, rng=np.random.default_rng(seed))  # noqa: E731
    assert w2(x + 16, 130, 0) == pytest.approx(32)
    assert w2(y, 50, 3) == w2(y, 50, 3) != w2(y, 50, 4)


def test_blocks_do_not_change_distances(clouds):
    x, y = clouds
    blocks = np.concatenate([b for _, b in d.squared_distance_blocks(x, y, 7)])
    np.testing.assert_allclose(blocks, ((x[:, None] - y) ** 2).sum(-1), atol=1e-12)


@pytest.mark.parametrize("metric", [d.frechet_distance, d.mmd2_rbf, d.mmd2_median, d.energy_distance])
def test_real_against_real_is_nearer_than_shifted(metric):
    x, same, other = np.random.default_rng(0).normal(size=(3, 300, 5))
    assert 0 <= metric(x, same) < 0.3 * metric(x, other + 1)


def test_clouds_of_different_width_and_nan_are_refused():
    with pytest.raises(ValueError, match="equal coordinates"):
        d.energy_distance(np.zeros((3, 2)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="NaN"):
        d.mmd2_rbf(np.full((3, 2), np.nan), np.zeros((3, 2)))
