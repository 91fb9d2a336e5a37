"""Gene-wise and cell-wise statistics of counts, exact and in one pass over chunks of cells.

Everything takes CSR *counts* (cells, genes), integers stored in any dtype. The space called **log1p CP10k** is
x = log(1 + 1e4 * count / library size of the cell), natural log; a cell without counts stays all zero. Moments and
their agreement take values of log1p CP10k too, which a Gaussian head draws: of any sign, and hardly ever zero.

Shape letters: n cells, g genes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.stats import ks_2samp

CHUNK = 4096  # cells; bounds the memory of a pass over a large matrix


def as_counts(x: sp.spmatrix | np.ndarray) -> sp.csr_matrix:
    """Return counts as CSR float64 without stored zeros; refuse negative or infinite values. Never modifies x."""
    x = sp.csr_matrix(x, dtype=np.float64)
    if not x.has_canonical_format or (x.data == 0).any():
        x = x.copy()  # it may share arrays with the argument
        x.sum_duplicates()
        x.eliminate_zeros()
    if not np.isfinite(x.data).all():
        raise ValueError(f"counts must be finite; {int((~np.isfinite(x.data)).sum())} entries are not")
    if len(x.data) and x.data.min() < 0:
        raise ValueError(f"counts must not be negative; the smallest is {x.data.min():g}")
    return x


def as_log_values(x: sp.spmatrix | np.ndarray) -> sp.csr_matrix:
    """Return log1p CP10k values that a model drew, CSR float32; refuse infinite ones."""
    x = sp.csr_matrix(x, dtype=np.float32)
    if not np.isfinite(x.data).all():
        raise ValueError(f"log1p CP10k values must be finite; {int((~np.isfinite(x.data)).sum())} entries are not")
    return x


def log1p_cp10k(counts: sp.spmatrix | np.ndarray, target: float = 1e4) -> sp.csr_matrix:
    """Return log(1 + target * count / library size), (n, g) CSR float64; zeros stay zeros."""
    x = as_counts(counts)
    size = np.asarray(x.sum(1)).ravel()
    scale = np.divide(target, size, out=np.zeros_like(size), where=size > 0)
    x.data = np.log1p(x.data * np.repeat(scale, np.diff(x.indptr)))
    return x


def chunks(x: sp.csr_matrix, rows: int = CHUNK) -> Iterator[sp.csr_matrix]:
    """Yield x in chunks of rows."""
    return (x[i : i + rows] for i in range(0, x.shape[0], rows))


@dataclass(frozen=True)
class GeneMoments:
    """Per-gene moments of n cells; two of them can be merged exactly (Chan, Golub, LeVeque 1979)."""

    n_cells: int
    mean: np.ndarray  # (g,)
    m2: np.ndarray  # (g,), sum of squared deviations from the mean
    n_zero: np.ndarray  # (g,), cells in which the gene is zero

    @property
    def variance(self) -> np.ndarray:
        """Unbiased variance (divided by n - 1), (g,)."""
        if self.n_cells < 2:
            raise ValueError(f"a variance needs at least 2 cells; got {self.n_cells}")
        return self.m2 / (self.n_cells - 1)

    @property
    def zero_fraction(self) -> np.ndarray:
        """Share of cells in which each gene is zero, (g,)."""
        return self.n_zero / self.n_cells

    @classmethod
    def from_chunk(cls, x: sp.csr_matrix) -> GeneMoments:
        """Compute moments by two passes over one chunk, without a difference of large squares."""
        n, g = x.shape
        if not n:
            raise ValueError("a chunk of cells must not be empty")
        nonzero = np.bincount(x.indices, minlength=g)
        mean = np.bincount(x.indices, weights=x.data, minlength=g) / n
        deviation = (x.data - mean[x.indices]) ** 2
        m2 = np.bincount(x.indices, weights=deviation, minlength=g) + (n - nonzero) * mean**2
        return cls(n, mean, m2, n - nonzero)

    def merge(self, other: GeneMoments) -> GeneMoments:
        """Return the moments of both sets of cells together."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {len(self.mean)} genes cannot be merged with those of {len(other.mean)}")
        n = self.n_cells + other.n_cells
        delta = other.mean - self.mean
        return GeneMoments(
            n,
            self.mean + delta * other.n_cells / n,
            self.m2 + other.m2 + delta**2 * self.n_cells * other.n_cells / n,
            self.n_zero + other.n_zero,
        )


def gene_moments(count_chunks: Iterable[sp.csr_matrix], *, log_normalise: bool = True) -> GeneMoments:
    """Return mean, variance and zeros of every gene over chunks of counts, by default in log1p CP10k."""
    return moments_of(log1p_cp10k(chunk) if log_normalise else as_counts(chunk) for chunk in count_chunks)


def moments_of(chunks: Iterable[sp.csr_matrix]) -> GeneMoments:
    """Return mean, variance and zeros of every gene over chunks of values as they are."""
    total: GeneMoments | None = None
    for chunk in chunks:
        part = GeneMoments.from_chunk(chunk)
        total = part if total is None else total.merge(part)
    if total is None:
        raise ValueError("no cells to take gene moments from")
    return total


def r2_identity(real: np.ndarray, generated: np.ndarray) -> float:
    """Return the coefficient of determination against the identity line, which penalises bias and a wrong scale.

    1 - sum (generated - real)^2 / sum (real - mean real)^2. Higher is better, 1 at best, below 0 where the real mean
    predicts better. Equals sklearn.metrics.r2_score(real, generated).
    """
    total = ((real - real.mean()) ** 2).sum()
    if total == 0:
        raise ValueError(
            f"R² is undefined: the real statistic is the same ({real.flat[0]:g}) for all {len(real)} genes"
        )
    return float(1 - ((generated - real) ** 2).sum() / total)


def pearson_squared(real: np.ndarray, generated: np.ndarray) -> float:
    """Return the squared Pearson correlation: what many papers call R².

    Ignores bias and scale. Higher is better, 1 at best.
    """
    a, b = real - real.mean(), generated - generated.mean()
    scale = (a**2).sum() * (b**2).sum()
    if scale == 0:
        raise ValueError("the squared correlation is undefined: one statistic is the same for all genes")
    return float((a @ b) ** 2 / scale)


def gene_statistics_agreement(real: GeneMoments, generated: GeneMoments, *, counted: bool = True) -> dict[str, float]:
    """Return the agreement of gene means, variances and zero fractions over genes; higher is better, 1 at best.

    Keys `gene_{mean,variance,zero_fraction}_{r2,pearson2}`: r2 by `r2_identity`, pearson2 by `pearson_squared`. Over
    genes with a count in at least one cell of either set: genes silent in both would only inflate the agreement.

    Args:
        counted: Whether the generated values are counts. If not, they have no zeros: there is no agreement of zero
            fractions, and the genes are those with a count in a real cell.
    """
    seen = real.n_zero < real.n_cells
    if counted:
        seen |= generated.n_zero < generated.n_cells
    out = {}
    for name in ("mean", "variance", "zero_fraction") if counted else ("mean", "variance"):
        a, b = getattr(real, name)[seen], getattr(generated, name)[seen]
        out[f"gene_{name}_r2"] = r2_identity(a, b)
        out[f"gene_{name}_pearson2"] = pearson_squared(a, b)
    return out


def zero_fraction(counts: sp.csr_matrix) -> float:
    """Return the share of zero entries of the whole matrix, over all genes of the vocabulary."""
    return 1 - as_counts(counts).nnz / (counts.shape[0] * counts.shape[1])


def library_sizes(counts: sp.csr_matrix) -> np.ndarray:
    """Return the sum of counts of each cell, (n,)."""
    return np.asarray(counts.sum(1)).ravel()


def genes_per_cell(counts: sp.csr_matrix) -> np.ndarray:
    """Return the number of genes with a count in each cell, (n,)."""
    return np.diff(as_counts(counts).indptr)


def weighted_gene_moments(x: sp.csr_matrix, weights: np.ndarray) -> list[GeneMoments]:
    """Return the moments of the genes of x (n, g) under each row of weights (r, n).

    A half has weight at its cells only.

    x holds values of log1p CP10k: below 10, so that a difference of squares loses no significant digit.
    """
    n = (weights > 0).sum(1)
    squares, seen = x.copy(), x.copy()
    squares.data, seen.data = x.data**2, np.ones_like(x.data)
    mean, second, share = ((m.T @ weights.T).T for m in (x, squares, seen))
    m2 = np.maximum(second - mean**2, 0) * n[:, None]
    n_zero = np.rint((1 - share) * n[:, None])
    return [GeneMoments(int(k), *parts) for k, *parts in zip(n, mean, m2, n_zero, strict=True)]


def ks_statistic(real: np.ndarray, generated: np.ndarray) -> float:
    """Return the Kolmogorov-Smirnov statistic, the largest gap between two empirical distribution functions.

    Used on library sizes and genes per cell of raw counts. Lower is better, 0 at best, 1 at worst.
    """
    return float(ks_2samp(real, generated).statistic)


def weighted_ks(real: np.ndarray, generated: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return `ks_statistic` of weighted values for every row of weights u (r, n) and v (r, m), which sum to 1: (r,)."""
    values = np.concatenate([real, generated])
    order = np.argsort(values, kind="stable")
    last = np.append(np.diff(values[order]) > 0, True)  # last of a run of ties
    gap = np.cumsum(np.concatenate([u, -v], axis=1)[:, order], axis=1)[:, last]
    return abs(gap).max(1)
