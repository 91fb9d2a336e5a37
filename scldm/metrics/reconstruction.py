"""How well the VAE gives a cell back: decoded *means* against counts, in log1p CP10k.

The paper's PCC and MSE are of negative-binomial draws, per gene inside one batch, which adds sampling noise and makes
them depend on the batch size; ours are of means, over all cells at once, so they are not comparable with that table.

Shape letters: n cells, g genes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from scldm.metrics.expression import log1p_cp10k


@dataclass(frozen=True)
class Reconstruction:
    """Scores of n cells.

    Attributes:
        nll: Negative log-likelihood of the counts, nats summed over all genes, mean over cells. Lower is better. None
            where the caller has no likelihood.
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
    """Pearson correlation of each column of x with the same column of y, and the number of columns left out.

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
    if mu.shape != counts.shape:
        raise ValueError(f"mu must have the shape of the counts, {counts.shape}; got {mu.shape}")
    if nll is not None and nll.shape != (counts.shape[0],):
        raise ValueError(f"nll must have one value per cell, shape {counts.shape[:1]}; got {nll.shape}")
    if nll is not None and not np.isfinite(nll).all():
        raise ValueError(f"nll must be finite; {int((~np.isfinite(nll)).sum())} of {len(nll)} cells are not")
    real = log1p_cp10k(counts).toarray()
    size = mu.sum(1, keepdims=True)
    decoded = np.log1p(mu.astype(np.float64) / np.where(size > 0, size, 1) * 1e4)
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
