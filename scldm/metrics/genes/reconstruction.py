"""Reconstruction: decoded means, and counts drawn from them, against the counts, in log1p CP10k.

The paper's PCC and MSE are of negative-binomial *draws*, per gene inside one batch (128 or 256 cells, genes without
variance dropped). Draws carry sampling noise that no model can avoid, and a correlation inside a batch depends on its
size. Ours are over all cells together, of means and, named `_draws`, of draws: the latter are nearest to the paper's
table, but still not the same number.

A Gaussian head's means are log1p CP10k already and are compared as they are; it draws no counts.

Shape letters: n cells, g genes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp

from scldm.metrics.genes.expression import as_counts, log1p_cp10k
from scldm.metrics.resampling import Halves
from scldm.metrics.score import Score


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction scores of n cells.

    Attributes:
        nll: Negative log-likelihood of the counts, nats summed over all genes, mean over cells. Lower is better. None
            if the caller has no likelihood.
        gene_pearson: Mean over genes of the correlation across cells. Higher is better, 1 at best.
        cell_pearson: Mean over cells of the correlation across genes. Higher is better, 1 at best.
        mse: Mean squared error over all cells and genes. Lower is better.
        n_genes_excluded: Genes without variance in the counts or in the means; their correlation is undefined.
    """

    nll: float | None
    gene_pearson: float
    cell_pearson: float
    mse: float
    n_cells: int
    n_genes_excluded: int
    n_cells_excluded: int


def correlations(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the Pearson correlation of each column of x with the same column of y, and the number of columns left out.

    A column is left out if it has no variance in x or in y: the coefficient does not exist there.
    """
    if x.shape != y.shape:
        raise ValueError(f"both must have one shape (cells, genes); got {x.shape} and {y.shape}")
    # A constant column can keep rounding residue after centring: compare values, not the residue.
    varies = (np.ptp(x, axis=0) > 0) & (np.ptp(y, axis=0) > 0)
    a, b = x[:, varies] - x[:, varies].mean(0), y[:, varies] - y[:, varies].mean(0)
    r = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return r, int((~varies).sum())


def reconstruction_scores(counts: sp.csr_matrix, mu: np.ndarray, nll: np.ndarray | None = None) -> Reconstruction:
    """Score decoded means of real cells.

    Args:
        counts: Real counts, (n, g) CSR.
        mu: Decoded mean counts of the same cells, (n, g).
        nll: Negative log-likelihood of each cell, nats summed over genes, (n,); from the model.
    """
    real, decoded = _in_log_space(counts, mu, nll)
    by_gene, genes_excluded = correlations(real, decoded)
    by_cell, cells_excluded = correlations(real.T, decoded.T)
    if not len(by_gene) or not len(by_cell):
        raise ValueError(f"no gene or no cell of {counts.shape} varies in both counts and means: no correlation exists")
    return Reconstruction(
        nll=None if nll is None else float(nll.mean()),
        gene_pearson=float(by_gene.mean()),
        cell_pearson=float(by_cell.mean()),
        mse=float(((real - decoded) ** 2).mean()),
        n_cells=counts.shape[0],
        n_genes_excluded=genes_excluded,
        n_cells_excluded=cells_excluded,
    )


def _in_log_space(
    counts: sp.csr_matrix, mu: np.ndarray, nll: np.ndarray | None, *, counted: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return log1p CP10k of counts and of means, (n, g) each; refuse shapes and values that do not match."""
    if mu.shape != counts.shape:
        raise ValueError(f"mu must have the shape of the counts, {counts.shape}; got {mu.shape}")
    if nll is not None and nll.shape != (counts.shape[0],):
        raise ValueError(f"nll must have one value per cell, shape {counts.shape[:1]}; got {nll.shape}")
    if nll is not None and not np.isfinite(nll).all():
        raise ValueError(f"nll must be finite; {int((~np.isfinite(nll)).sum())} of {len(nll)} cells are not")
    real = log1p_cp10k(counts).toarray()
    if not counted:
        return real, mu.astype(np.float64)
    size = mu.sum(1, keepdims=True)
    decoded = np.log1p(mu.astype(np.float64) / np.where(size > 0, size, 1) * 1e4)
    return real, decoded


def zero_accuracy(counts: sp.csr_matrix, draws: sp.csr_matrix) -> np.ndarray:
    """Return the share of genes that are zero in both or in neither, of each cell, (n,). Higher is better, 1 at best.

    Zeros are random in draws: even the draws of the true model would not reach 1.
    """
    a, b = (as_counts(m).astype(bool).astype(np.float64) for m in (counts, draws))
    either = np.asarray(a.sum(1)).ravel() + np.asarray(b.sum(1)).ravel()
    both = np.asarray(a.multiply(b).sum(1)).ravel()
    return 1 - (either - 2 * both) / counts.shape[1]


def reconstruction_table(
    counts: sp.csr_matrix,
    mu: np.ndarray,
    halves: Halves,
    *,
    refits: int,
    nll: np.ndarray | None = None,
    draws: sp.csr_matrix | None = None,
    counted: bool = True,
) -> dict[str, Score]:
    """Return `reconstruction_*` scores with resamples over the cells.

    nll (lower), gene_pearson and cell_pearson (higher), mse (lower) on means; the same but nll on draws, with `_draws`;
    zero_accuracy (higher) of the draws. Definitions: `Reconstruction`, `zero_accuracy`.

    Args:
        counts, mu, nll: As for `reconstruction_scores`.
        halves: Halves of the cells. Scores of single cells are averaged over all of them, per-gene correlations are
            computed for the first `refits`.
        refits: Number of halves for per-gene correlations.
        draws: Counts drawn from the decoded distribution, (n, g).
        counted: Whether mu is mean counts; if not, it is means of log1p CP10k.
    """
    real, decoded = _in_log_space(counts, mu, nll, counted=counted)
    out: dict[str, Score] = {}
    if nll is not None:
        title = "negative log-likelihood, nats per cell over all genes"
        out["reconstruction_nll"] = _mean(nll, halves, "lower", title)
    out |= _against(real, decoded, halves, refits, "", "on means")
    if draws is not None:
        out |= _against(real, log1p_cp10k(draws).toarray(), halves, refits, "_draws", "on draws")
        title = "zeros and non-zeros in place, on draws"
        out["reconstruction_zero_accuracy"] = _mean(zero_accuracy(counts, draws), halves, "higher", title, (0.0, 1.0))
    return out


def _against(
    real: np.ndarray, decoded: np.ndarray, halves: Halves, refits: int, suffix: str, basis: str
) -> dict[str, Score]:
    by_gene = _gene_correlations(real, decoded, halves, refits)
    varies = (np.ptp(real, axis=1) > 0) & (np.ptp(decoded, axis=1) > 0)
    found = {}
    if by_gene is not None:
        found[f"reconstruction_gene_pearson{suffix}"] = Score(
            float(by_gene[0]),
            "higher",
            1.0,
            "reconstruction",
            f"Pearson per gene, {basis}",
            by_gene[1:],
            (-1.0, 1.0),
        )
    if varies.any():
        by_cell, _ = correlations(real[varies].T, decoded[varies].T)
        found[f"reconstruction_cell_pearson{suffix}"] = _mean(
            by_cell, Halves(halves.chosen[:, varies]), "higher", f"Pearson per cell, {basis}", (-1.0, 1.0)
        )
    squares = ((real - decoded) ** 2).mean(1)
    found[f"reconstruction_mse{suffix}"] = _mean(squares, halves, "lower", f"MSE (log1p CP10k), {basis}", (0.0, np.inf))
    return found


def _gene_correlations(real: np.ndarray, decoded: np.ndarray, halves: Halves, refits: int) -> np.ndarray | None:
    """Return the mean correlation over genes of all cells and of halves, (1 + refits,).

    None if no gene varies on both sides: cells of one class have one mean profile in a baseline that knows the class.
    """
    sets = [np.arange(len(real)), *map(halves.members, range(refits))]
    each = [correlations(real[rows], decoded[rows])[0] for rows in sets]
    return np.array([r.mean() for r in each]) if all(len(r) for r in each) else None


def _mean(
    values: np.ndarray,
    halves: Halves,
    better: Literal["lower", "higher"],
    title: str,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Score:
    means = halves.weights @ values
    return Score(float(means[0]), better, float(better == "higher"), "reconstruction", title, means[1:], bounds)
