"""Log fold changes: does a class differ from the other cells as it does among real cells?

LFC_g = log2((m_class,g + 1) / (m_against,g + 1)), m the mean counts per 10,000 of gene g: one count per 10,000 is added
so that the noise of rare genes does not dominate. `against` is all other cells of the same side, or real training cells
of a control class, the same ones for real and generated. Only genes of the space count. A generator that shrinks
effects has a slope below 1 and may still have a high correlation.

Where a candidate holds log1p CP10k values, drawn from a Gaussian head, LFC_g = (m_class,g - m_against,g) / ln 2 with m
the mean of log1p CP10k, for every candidate: the mean of exponentiated draws would mostly be their noise.
Source: perturbation benchmarks (log-fold-change recovery and attenuation).

Shape letters: n cells, h genes, w rows of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from scldm.metrics.cell_set import CellSet
from scldm.metrics.genes.expression import as_counts, library_sizes

PSEUDO = 1.0  # counts per 10,000


def cp10k(counts: sp.csr_matrix, genes: np.ndarray) -> sp.csr_matrix:
    """Return counts per 10,000 of some genes, (n, h); the library size is over all genes."""
    counts = as_counts(counts)
    size = library_sizes(counts)
    scale = np.divide(1e4, size, out=np.zeros_like(size), where=size > 0)
    return (sp.diags_array(scale).tocsr() @ counts[:, genes]).tocsr()


def weighted_sum(x: sp.csr_matrix, rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of some rows of x under weights (w, n), (w, h), and the sum of these weights, (w, 1)."""
    own = weights[:, rows]
    return (x[rows].T @ own.T).T, own.sum(1, keepdims=True)


def log_fold_change(inside: np.ndarray, against: np.ndarray) -> np.ndarray:
    """Return the log2 fold change of mean counts per 10,000, elementwise."""
    return np.log2((inside + PSEUDO) / (against + PSEUDO))


@dataclass(frozen=True)
class ChangeScale:
    """What is averaged over the cells of a class, and how two means are compared."""

    values: Callable[[CellSet, np.ndarray], sp.csr_matrix]  # of cells and genes (h,): (n, h)
    change: Callable[[np.ndarray, np.ndarray], np.ndarray]  # from the means of a class and of its reference
    least: float  # smallest mean that exists


OF_COUNTS = ChangeScale(lambda cells, genes: cp10k(cells.counts, genes), log_fold_change, 0.0)
OF_LOG_VALUES = ChangeScale(
    lambda cells, genes: cells.log_values[:, genes], lambda inside, against: (inside - against) / np.log(2), -np.inf
)


def recovery(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """Return (Pearson, slope) of generated on real log fold changes (h,).

    Higher is better, 1 at best; the slope's ideal is 1.

    The slope is cov(real, generated) / var(real). The noise of the real estimates lowers
    both numbers for any candidate, also for the floor. Pearson is 0 if the generated values do not vary: nothing is
    recovered.
    """
    a, b = real - real.mean(), generated - generated.mean()
    variance = float(a @ a)
    if variance == 0:
        raise ValueError(f"the real log fold changes of {len(real)} genes are all equal: no recovery is defined")
    slope = float(a @ b) / variance
    norm = np.sqrt(variance * float(b @ b))
    return (0.0 if norm == 0 else float(a @ b) / norm), slope
