"""Upstream's validation metrics, for comparison with its logs only; see `compare` for ours.

Some do not measure what they are named after: an RBF kernel of scale 1 between cells of thousands of genes sees only a
cell with itself; Tanimoto's similarity divides by a sum that may vanish on counts; a Sinkhorn distance whose kernel
underflows is 0.

Shape letters: n cells of x, m cells of y, g genes. Functions compute in the dtype of their arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import kron, vstack
from torch import Tensor

EPS = 1e-8  # added to denominators
MIN_VARIANCE = 1e-8
MAX_ITERATIONS = 1_000_000  # Sinkhorn: a small reg needs many
Kernel = Callable[[Tensor, Tensor], Tensor]  # (n, g), (m, g) -> (n, m)


def rbf(scale: float = 1.0) -> Kernel:
    """exp(-scale |x - y|²)."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squares = x.square().sum(dim=1, keepdim=True) - 2 * x @ y.T + y.square().sum(dim=1)
        return torch.exp(-scale * squares)

    return kernel


def braycurtis(x: Tensor, y: Tensor) -> Tensor:
    """1 - sum |x - y| / sum |x + y|."""
    x, y = x.unsqueeze(1), y.unsqueeze(0)
    return 1 - (x - y).abs().sum(dim=2) / ((x + y).abs().sum(dim=2) + EPS)


def tanimoto(x: Tensor, y: Tensor) -> Tensor:
    """sum xy / sum (x + y - xy): a share for indicators; of counts the denominator changes sign."""
    x, y = x.unsqueeze(1), y.unsqueeze(0)
    return (x * y).sum(dim=2) / ((x + y - x * y).sum(dim=2) + EPS)


def ruzicka(x: Tensor, y: Tensor) -> Tensor:
    """sum min(x, y) / sum max(x, y)."""
    x, y = x.unsqueeze(1), y.unsqueeze(0)
    return torch.minimum(x, y).sum(dim=2) / (torch.maximum(x, y).sum(dim=2) + EPS)


def mmd2(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    """Biased squared maximum mean discrepancy."""
    return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()


def linear_mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Linear-time estimate with a linear kernel: differences of neighbouring rows; x and y (n, g)."""
    delta = x - y
    return (delta[:-1] * delta[1:]).sum(dim=1).mean()


def poly_mmd2(x: Tensor, y: Tensor, *, degree: int = 2, offset: float = 2.0) -> Tensor:
    """Linear-time estimate with a polynomial kernel."""

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return ((a[:-1] * b[1:]).sum(dim=1) + offset).pow(degree).mean()

    return mean(x, x) + mean(y, y) - mean(x, y) - mean(y, x)


def mixed_rbf_kernels(x: Tensor, y: Tensor, sigmas: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over sigma of Gaussian kernels: x with x, x with y, y with y; each (n, n)."""
    z = torch.cat([x, y])
    products = z @ z.T
    norms = products.diagonal().unsqueeze(1)
    squares = norms - 2 * products + norms.T
    kernel = sum((torch.exp(-squares / (2 * sigma**2)) for sigma in sigmas), torch.zeros_like(squares))
    n = len(x)
    return kernel[:n, :n], kernel[:n, n:], kernel[n:, n:]


def mixed_rbf_mmd2(x: Tensor, y: Tensor, sigmas: tuple[float, ...], *, biased: bool) -> Tensor:
    """Squared discrepancy of equal numbers of cells; unbiased leaves a cell with itself out."""
    xx, xy, yy = mixed_rbf_kernels(x, y, sigmas)
    n = len(x)
    if biased:
        return xx.sum() / n**2 + yy.sum() / n**2 - 2 * xy.sum() / n**2
    off_x, off_y = xx.sum() - xx.diagonal().sum(), yy.sum() - yy.diagonal().sum()
    return off_x / (n * (n - 1)) + off_y / (n * (n - 1)) - 2 * xy.sum() / n**2


def mixed_rbf_ratio(x: Tensor, y: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    """(3,): discrepancy over its standard deviation, the biased discrepancy, its variance (Sutherland et al. 2017)."""
    xx, xy, yy = mixed_rbf_kernels(x, y, sigmas)
    variance = _mmd2_variance(xx, xy, yy)
    value = mixed_rbf_mmd2(x, y, sigmas, biased=True)
    return torch.stack([value / variance.clamp(min=MIN_VARIANCE).sqrt(), value, variance])


def _mmd2_variance(xx: Tensor, xy: Tensor, yy: Tensor) -> Tensor:
    """Unbiased estimate of the variance of the unbiased statistic, from kernels without their diagonals."""
    n = float(len(xx))
    xx, yy = (k - torch.diag(k.diagonal()) for k in (xx, yy))
    rows_x, rows_y, rows_xy, columns_xy = xx.sum(dim=1), yy.sum(dim=1), xy.sum(dim=1), xy.sum(dim=0)
    total_x, total_y, total_xy = rows_x.sum(), rows_y.sum(), xy.sum()
    own = 2 * rows_x.dot(rows_x) - xx.square().sum() + 2 * rows_y.dot(rows_y) - yy.square().sum()
    cross = rows_xy.dot(rows_xy) + columns_xy.dot(columns_xy)
    mixed = (total_x + total_y) * total_xy / n - rows_x.dot(rows_xy) - rows_y.dot(columns_xy)
    return (
        2 / (n**2 * (n - 1) ** 2) * own
        - (4 * n - 6) / (n * (n - 1)) ** 3 * (total_x**2 + total_y**2)
        + 4 * (n - 2) / (n**3 * (n - 1) ** 2) * cross
        - 4 * (n - 3) / (n**3 * (n - 1) ** 2) * xy.square().sum()
        - (8 * n - 12) / (n**5 * (n - 1)) * total_xy**2
        + 8 / (n**3 * (n - 1)) * mixed
    )


def r2(predicted: Tensor, target: Tensor) -> Tensor:
    """Coefficient of determination of two vectors (g,)."""
    return 1 - (target - predicted).square().sum() / (target - target.mean()).square().sum()


def gene_correlations(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of each gene across cells, (g,); NaN for a gene without variance."""
    a, b = x - x.mean(dim=0), y - y.mean(dim=0)
    return (a * b).sum(dim=0) / (a.square().sum(dim=0) * b.square().sum(dim=0)).sqrt()


def exact_transport(x: Tensor, y: Tensor, *, power: int) -> float:
    """Exact Wasserstein distance of two clouds of equal weights, in float64."""
    cost = torch.cdist(x.double(), y.double()).pow(power).numpy()
    n, m = cost.shape
    if n == m:
        total = cost[linear_sum_assignment(cost)].mean()
    else:
        rows, columns = kron(np.eye(n), np.ones((1, m))), kron(np.ones((1, n)), np.eye(m))
        weights = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
        total = linprog(cost.ravel(), A_eq=vstack([rows, columns]), b_eq=weights, method="highs").fun
    return float(total) ** (1 / power)


def sinkhorn_transport(x: Tensor, y: Tensor, *, power: int, reg: float, tolerance: float = 1e-9) -> float:
    """Transport cost of the plan of least cost plus entropy (Cuturi 2013), in float64.

    The kernel is exponentiated at once, as upstream does: for its reg of 0.05 and squared distances of thousands it is
    0 everywhere, which is an error here and a distance of 0 there.
    """
    cost = torch.cdist(x.double(), y.double()).pow(power).numpy()
    kernel, n, m = np.exp(-cost / reg), len(x), len(y)
    if not ((kernel.sum(axis=0) > 0).all() and (kernel.sum(axis=1) > 0).all()):
        raise FloatingPointError(f"exp(-cost / {reg:g}) underflows: costs reach {cost.max():.3g}")
    u = np.full(n, 1 / n)
    for iteration in range(MAX_ITERATIONS):
        v = (1 / m) / (kernel.T @ u)
        u = (1 / n) / (kernel @ v)
        if iteration % 10 == 0 and np.linalg.norm(v * (kernel.T @ u) - 1 / m) < tolerance:
            return float(u @ (kernel * cost) @ v) ** (1 / power)
    raise RuntimeError(f"Sinkhorn's iteration did not reach {tolerance:g} in {MAX_ITERATIONS} rounds; reg {reg:g}")
