"""Weighted means over pairs of points on a device: the slowest part of a comparison, for a GPU.

`distances.weighted_pair_means` is the reference in NumPy; this is the same sum in float64 torch, by blocks. The two
are equal up to rounding, so that scores of machines with and without a GPU are comparable.

Shape letters: n points of x, m points of y, p coordinates, r resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

DEVICE_BLOCK = 4096  # rows of a pairwise block: 4,096 x 5,000 numbers are 160 MB

TensorKernel = Callable[[Tensor], Tensor]  # function of squared distances


def present_device() -> torch.device | None:
    """Return the GPU of this process, or None: NumPy is used then."""
    return torch.device("cuda") if torch.cuda.is_available() else None


@torch.no_grad()
def pair_means_on(
    device: torch.device, x: np.ndarray, y: np.ndarray, kernels: Sequence[TensorKernel], *, u: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """Return sum over i, j of u_ri v_rj k(|x_i - y_j|²) for every kernel k and row r of weights, (kernels, r).

    Args:
        device: Device of the computation.
        x: Points, (n, p).
        y: Points, (m, p). If it is the same array as x, a point is at distance 0 exactly from itself.
        kernels: Functions of squared distances.
        u: Weights of x, (r, n), rows sum to 1.
        v: Weights of y, (r, m).
    """
    same = x is y
    a, b, c, d = (torch.as_tensor(z, dtype=torch.float64, device=device) for z in (x, y, u, v))
    bb = b.square().sum(1)
    out = torch.zeros(len(kernels), len(u), dtype=torch.float64, device=device)
    for start in range(0, len(a), DEVICE_BLOCK):
        rows = slice(start, min(start + DEVICE_BLOCK, len(a)))
        d2 = (a[rows].square().sum(1)[:, None] + bb - 2 * a[rows] @ b.T).clamp_(min=0)
        if same:
            d2[:, rows].fill_diagonal_(0)
        for total, kernel in zip(out, kernels, strict=True):
            total += ((d @ kernel(d2).T) * c[:, rows]).sum(1)
    return out.cpu().numpy()
