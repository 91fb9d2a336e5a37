"""Distances between two clouds of points (cells in a space fitted on real cells, see `projection`).

All are 0 for equal distributions, lower is better, and all are biased upwards by small samples: compare them with the
real-vs-real floor at the same number of cells. Pairwise sums run in blocks of rows, so memory is bounded.

Shape letters: n points of x (real), m points of y (generated), p coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from scldm.metrics.distribution.device_pairs import pair_means_on, present_device

BLOCK = 1024  # rows of a pairwise block
CFGEN_SIGMAS = (0.01, 0.1, 1.0, 10.0, 100.0)


def _check(x: np.ndarray, y: np.ndarray, *, at_least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"both clouds must be (points, coordinates) with equal coordinates; got {x.shape}, {y.shape}")
    if min(len(x), len(y)) < at_least:
        raise ValueError(f"this distance needs at least {at_least} points on each side; got {len(x)} and {len(y)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("points must be finite; a cloud holds NaN or infinity")
    return x, y


def squared_distance_blocks(x: np.ndarray, y: np.ndarray, block: int = BLOCK) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield squared Euclidean distances of rows of x to all of y: (slice of rows, (rows, m))."""
    yy = (y**2).sum(1)
    for start in range(0, len(x), block):
        rows = slice(start, min(start + block, len(x)))
        d2 = (x[rows] ** 2).sum(1)[:, None] + yy - 2 * x[rows] @ y.T
        yield rows, np.maximum(d2, 0, out=d2)


def _pair_mean(x: np.ndarray, y: np.ndarray, f: Callable[[np.ndarray], np.ndarray]) -> float:
    """Return the mean of f(squared distance) over all pairs; a point is at distance 0 exactly from itself."""
    total = 0.0
    for rows, d2 in squared_distance_blocks(x, y):
        if x is y:
            d2[np.arange(len(d2)), np.arange(rows.start, rows.stop)] = 0
        total += float(f(d2).sum())
    return total / (len(x) * len(y))


Kernel = Callable[[Any], Any]  # function of squared distances: an array or, on a device, a tensor


def weighted_pair_means(
    x: np.ndarray, y: np.ndarray, kernels: Sequence[Kernel], *, u: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """Return sum over i, j of u_ri v_rj k(|x_i - y_j|²) for every kernel k and row r of weights, (kernels, r).

    One pass over the pairs serves all kernels and resamples; memory is that of a block of rows. A GPU is used if this
    process has one (`device_pairs`).

    Args:
        u: Weights of x, (r, n), rows sum to 1.
        v: Weights of y, (r, m).
    """
    device = present_device()
    if device is not None:
        return pair_means_on(device, x, y, kernels, u=u, v=v)
    out = np.zeros((len(kernels), len(u)))
    for rows, d2 in squared_distance_blocks(x, y):
        if x is y:
            d2[np.arange(len(d2)), np.arange(rows.start, rows.stop)] = 0
        for total, kernel in zip(out, kernels, strict=True):
            total += ((v @ kernel(d2).T) * u[:, rows]).sum(1)
    return out


def rbf_sum(sigmas: Sequence[float]) -> Kernel:
    """Return the kernel d² -> sum over sigma of exp(-d² / (2 sigma²))."""
    gammas = [1 / (2 * s**2) for s in sigmas]

    def kernel(d2: Any) -> Any:
        exp = torch.exp if isinstance(d2, torch.Tensor) else np.exp
        total = exp(-gammas[0] * d2)
        for gamma in gammas[1:]:
            total += exp(-gamma * d2)
        return total

    return kernel


def root(d2: Any) -> Any:
    """Return the kernel of the energy distance: the distance itself."""
    return d2**0.5


def _sqrt_psd(a: np.ndarray) -> np.ndarray:
    value, vector = np.linalg.eigh((a + a.T) / 2)
    return (vector * np.sqrt(np.maximum(value, 0))) @ vector.T


def frechet_gaussians(mean_x: np.ndarray, cov_x: np.ndarray, mean_y: np.ndarray, cov_y: np.ndarray) -> float:
    """Return the squared W2 of two Gaussians.

    |mean_x - mean_y|² + tr(cov_x + cov_y - 2 (cov_x^½ cov_y cov_x^½)^½).

    The symmetric form keeps the root real and the result >= 0. Dowson & Landau 1982; Heusel et al. 2017 (FID).
    """
    root = _sqrt_psd(cov_x)
    cross = np.linalg.eigvalsh(_symmetric(root @ cov_y @ root))
    trace = np.trace(cov_x) + np.trace(cov_y) - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return float(((mean_x - mean_y) ** 2).sum() + max(trace, 0.0))


def _symmetric(a: np.ndarray) -> np.ndarray:
    return (a + a.T) / 2


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return the Fréchet distance between Gaussians fitted to x and y (unbiased covariances), *squared*, as FID is.

    Space: PCA of log1p CP10k fitted on real. Lower is better, 0 at best. Formula: `frechet_gaussians`.
    """
    x, y = _check(x, y, at_least=2)
    return frechet_gaussians(*gaussian(x), *gaussian(y))


Gaussian = tuple[np.ndarray, np.ndarray]


def gaussian(x: np.ndarray) -> Gaussian:
    """Return the mean (p,) and unbiased covariance (p, p) of points."""
    return x.mean(0), np.cov(x.T).reshape(x.shape[1], -1)


def mmd2_rbf(x: np.ndarray, y: np.ndarray, sigmas: Sequence[float] = CFGEN_SIGMAS) -> float:
    """Return the biased (V-statistic) squared maximum mean discrepancy with a *sum* of RBF kernels.

    mean k(x,x') + mean k(y,y') - 2 mean k(x,y), pairs of a point with itself included;
    k(a,b) = sum over sigma of exp(-gamma |a-b|²), gamma = 1 / (2 sigma²): sigma is a distance, the convention of
    CFGen's `mix_rbf_mmd2` with sigma 0.01, 0.1, 1, 10, 100. In a PCA of some 30 coordinates the three small ones see
    only a point with itself and add about 1/n + 1/m each, whatever the data. Lower is better, 0 at best.
    Source: Gretton et al. 2012; CFGen (Palma et al. 2025). Space: PCA of log1p CP10k fitted on real.
    """
    x, y = _check(x, y)
    kernel = rbf_sum(sigmas)
    return max(_pair_mean(x, x, kernel) + _pair_mean(y, y, kernel) - 2 * _pair_mean(x, y, kernel), 0.0)


def median_distance(x: np.ndarray, limit: int = 2000) -> float:
    """Return the median distance between two different points among the first `limit` of x."""
    x, _ = _check(x[:limit], x[:limit], at_least=2)
    d2 = np.concatenate([block for _, block in squared_distance_blocks(x, x)])
    return float(np.sqrt(np.median(d2[np.triu_indices(len(x), 1)])))


def mmd2_median(x: np.ndarray, y: np.ndarray) -> float:
    """Return `mmd2_rbf` with one sigma, the median distance among *real* points x (biased, lower is better).

    The bandwidth comes from real cells only, so that all candidates are measured with the same kernel. Gretton et al.
    2012.
    """
    return mmd2_rbf(x, y, (median_distance(x),))


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return the energy distance 2 E|x-y| - E|x-x'| - E|y-y'| (V-statistic, not rooted). Lower is better.

    Székely & Rizzo 2013. In one dimension it is scipy.stats.energy_distance squared. Space: PCA fitted on real.
    """
    x, y = _check(x, y)
    return max(2 * _pair_mean(x, y, np.sqrt) - _pair_mean(x, x, np.sqrt) - _pair_mean(y, y, np.sqrt), 0.0)


def wasserstein(x: np.ndarray, y: np.ndarray, *, power: int, max_points: int, rng: np.random.Generator) -> float:
    """Return the exact Wasserstein distance W_power of equal-size subsamples.

    It is (min over matchings of mean |x-y|^power)^(1/power). k = min(n, m, max_points) points of each side are drawn
    without replacement by `rng`; the optimal matching is scipy.optimize.linear_sum_assignment, so the value is exact
    for those points (time grows as k³: some 0.2 s at 500 points, some seconds at 2,000). Lower is better. Space: PCA of
    log1p CP10k fitted on real (as in CFGen).
    """
    x, y = _check(x, y)
    x, y = (a[rng.permutation(len(a))] for a in (x, y))
    return matched(x, y, power=power, points=max_points)


def matched(x: np.ndarray, y: np.ndarray, *, power: int, points: int) -> float:
    """Return `wasserstein` of the first min(n, m, points) points of each side, which must be in random order."""
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2; got {power}")
    x, y = _check(x, y)
    k = min(len(x), len(y), points)
    cost = np.concatenate([d2 for _, d2 in squared_distance_blocks(x[:k], y[:k])])
    if power == 1:
        cost = np.sqrt(cost)
    row, column = linear_sum_assignment(cost)
    return float(cost[row, column].mean() ** (1 / power))
