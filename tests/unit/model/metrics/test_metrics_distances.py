"""Distances against closed forms, SciPy and scikit-learn."""

import itertools

import numpy as np
import pytest
import torch
from helpers.models.upstream_fixtures import load_fixture
from scipy.linalg import sqrtm
from scipy.optimize import linprog
from scipy.stats import energy_distance as scipy_energy
from scipy.stats import wasserstein_distance
from sklearn.metrics.pairwise import rbf_kernel

from scldm.metrics.distribution import distances as d


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


def test_weighted_pair_means_are_sums_over_pairs(clouds):
    x, y = clouds
    rng = np.random.default_rng(0)
    u, v = rng.random((3, len(x))), rng.random((3, len(y)))
    found = d.weighted_pair_means(x, y, [d.root, d.rbf_sum((0.5, 2.0))], u=u, v=v)
    distance = np.linalg.norm(x[:, None] - y, axis=-1)
    kernel = np.exp(-(distance**2) / 0.5) + np.exp(-(distance**2) / 8)
    expected = [[a @ k @ b for a, b in zip(u, v, strict=True)] for k in (distance, kernel)]
    np.testing.assert_allclose(found, expected)
    same = np.full((1, len(x)), 1 / len(x))
    own = d.weighted_pair_means(x, x, [d.root], u=same, v=same)
    assert own[0, 0] == pytest.approx(np.linalg.norm(x[:, None] - x, axis=-1).mean())


@pytest.mark.parametrize("space", ["counts", "lognorm", "scaled"])
def test_kernels_and_exact_transport_are_those_that_upstream_recorded(space):
    recorded = load_fixture("metrics")
    x, y = (recorded[f"in/{space}/{side}"].double().numpy() for side in "xy")
    expected = recorded[f"{space}/mix_rbf_ratio.f64"][1].item()
    assert d.mmd2_rbf(x, y) == pytest.approx(expected, rel=1e-9, abs=1e-10)
    scale = d.mmd2_rbf(x, y, (1 / np.sqrt(2 * 0.01),))  # upstream's exp(-scale |x - y|²)
    assert scale == pytest.approx(recorded[f"{space}/mmd_rbf_scale0_01.f64"].item(), rel=1e-8, abs=1e-9)
    for power in (1, 2):
        exact = recorded.facts["scalars"][f"{space}/wasserstein{power}_emd_reg0.05.f64"]
        assert d.matched(x, y, power=power, points=64) == pytest.approx(exact, rel=1e-6)


def test_pair_means_on_a_device_are_those_of_numpy(clouds, monkeypatch):
    x, y = clouds
    rng = np.random.default_rng(4)
    u, v = (rng.dirichlet(np.ones(len(z)), size=3) for z in (x, y))
    kernels = [d.root, d.rbf_sum(d.CFGEN_SIGMAS)]
    expected = [d.weighted_pair_means(x, y, kernels, u=u, v=v), d.weighted_pair_means(x, x, kernels, u=u, v=u)]
    monkeypatch.setattr(d, "present_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("scldm.metrics.distribution.device_pairs.DEVICE_BLOCK", 37)
    found = [d.weighted_pair_means(x, y, kernels, u=u, v=v), d.weighted_pair_means(x, x, kernels, u=u, v=u)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_exact_transport_is_that_of_pot(clouds):
    ot = pytest.importorskip("ot", reason="POT is in the dev extra")
    x, y = (c[:60] for c in clouds)
    even = np.full(60, 1 / 60)
    for power, metric in ((1, "euclidean"), (2, "sqeuclidean")):
        cost = ot.emd2(even, even, ot.dist(x, y, metric=metric))
        assert d.matched(x, y, power=power, points=60) == pytest.approx(cost ** (1 / power))


def test_exact_transport_is_the_optimum_of_the_linear_program(clouds):
    x, y = (c[:15] for c in clouds)
    for power in (1, 2):
        cost = np.linalg.norm(x[:, None] - y, axis=-1) ** power
        sums = np.concatenate([np.kron(np.eye(15), np.ones(15)), np.kron(np.ones(15), np.eye(15))])
        plan = linprog(cost.ravel(), A_eq=sums, b_eq=np.full(30, 1 / 15), method="highs")
        assert d.matched(x, y, power=power, points=15) == pytest.approx(plan.fun ** (1 / power))
