"""The space in which sets of cells are compared: fitted once on real training cells, then only applied.

log1p CP10k -> the most variable genes -> minus the real mean -> PCA. Generated cells are projected with the real
genes, mean and axes; a space refitted on them would adapt to their errors.

Rules for genes: `variance`, the highest variance of log1p CP10k, ties by position; `seurat_v3`, the highest variance of
clipped, standardised counts, where the standard deviation comes from a loess fit (span 0.3, degree 2) of log10 variance
on log10 mean (Stuart et al. 2019), as scanpy.pp.highly_variable_genes has it.

Shape letters: n cells, g genes of the vocabulary, h chosen genes, p coordinates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp

from scldm.errors import extra
from scldm.metrics.cell_set import CellSet
from scldm.metrics.genes.expression import as_counts, chunks, gene_moments, log1p_cp10k

with extra("score"):
    from sklearn.decomposition import PCA

GeneRule = Literal["variance", "seurat_v3"]
MIN_CELLS = 3  # with the gene, for seurat_v3


@dataclass(frozen=True)
class RealSpace:
    """A projection of counts: chosen genes, their real mean and principal axes."""

    n_genes: int
    genes: np.ndarray  # (h,) positions in the vocabulary
    mean: np.ndarray  # (h,)
    axes: np.ndarray  # (p, h), orthonormal rows
    explained: np.ndarray  # (p,), share of the variance of the chosen genes

    @classmethod
    def fit(
        cls, real_train: sp.csr_matrix, *, n_top_genes: int, n_pcs: int, seed: int, gene_rule: GeneRule = "variance"
    ) -> RealSpace:
        """Choose genes and axes on real counts.

        Args:
            real_train: Counts, (n, g).
            n_top_genes: Genes at most; a smaller vocabulary is used whole.
            n_pcs: Coordinates; must be below the number of cells and of chosen genes.
            seed: Seed of the randomised SVD.
            gene_rule: See the top of this file.
        """
        genes = most_variable(real_train, n_top_genes, gene_rule)
        if n_pcs >= min(real_train.shape[0], len(genes)):
            raise ValueError(
                f"n_pcs ({n_pcs}) must be below the number of training cells ({real_train.shape[0]}) and of chosen "
                f"genes ({len(genes)})"
            )
        dense = log1p_cp10k(real_train)[:, genes].toarray()
        pca = PCA(n_components=n_pcs, svd_solver="randomized", iterated_power=7, random_state=seed).fit(dense)
        return cls(real_train.shape[1], genes, pca.mean_, pca.components_, pca.explained_variance_ratio_)

    def project(self, counts: sp.csr_matrix) -> np.ndarray:
        """Return the coordinates of cells of these counts, (n, p)."""
        return self._coordinates(counts.shape[1], (log1p_cp10k(part) for part in chunks(sp.csr_matrix(counts))))

    def place(self, cells: CellSet) -> np.ndarray:
        """Return the coordinates of cells, (n, p), of counts or of log1p CP10k values."""
        return self._coordinates(cells.values.shape[1], cells.log_chunks())

    def _coordinates(self, n_genes: int, log_values: Iterable[sp.csr_matrix]) -> np.ndarray:
        if n_genes != self.n_genes:
            raise ValueError(f"the space was fitted on {self.n_genes} genes; got cells with {n_genes}")
        parts = [part[:, self.genes] @ self.axes.T for part in log_values]
        return np.concatenate(parts) - self.axes @ self.mean


def most_variable(counts: sp.csr_matrix, n: int, rule: GeneRule) -> np.ndarray:
    """Return the positions of the n most variable genes by a rule, ascending."""
    score = gene_moments(chunks(counts)).variance if rule == "variance" else seurat_v3_variance(counts)
    return np.sort(np.argsort(-score, kind="stable")[:n])


def seurat_v3_variance(counts: sp.csr_matrix) -> np.ndarray:
    """Return the variance of standardised counts clipped at sqrt(n), (g,).

    0 for a constant gene, or one in fewer than MIN_CELLS cells.

    Rare genes are left out, as is usual for this rule: thousands of genes of one count share one mean, and the local
    fit is singular there.

    sum over cells of min(x, c)² and of min(x, c), with c = mean + sd sqrt(n) and sd = 10^(loess / 2), give
    (n mean² + sum min² - 2 mean sum min) / ((n - 1) sd²).
    """
    with extra("score"):
        from skmisc.loess import loess  # compiled, and needed by this rule only

    counts = as_counts(counts)
    n = counts.shape[0]
    moments = gene_moments(chunks(counts), log_normalise=False)
    varies = (moments.variance > 0) & (n - moments.n_zero >= MIN_CELLS)
    mean = moments.mean
    fit = loess(np.log10(mean[varies]), np.log10(moments.variance[varies]), span=0.3, degree=2)
    try:
        fit.fit()
    except ValueError as error:
        raise ValueError(
            f"seurat_v3 cannot fit variance on mean of {int(varies.sum())} genes in {n} cells ({error}): too many "
            "genes have equal means; give it more cells, or take gene_rule=variance"
        ) from error
    sd = np.ones_like(mean)
    sd[varies] = np.sqrt(10**fit.outputs.fitted_values)
    clipped = np.minimum(counts.data, (mean + sd * np.sqrt(n))[counts.indices])
    total = np.bincount(counts.indices, weights=clipped, minlength=len(mean))
    squares = np.bincount(counts.indices, weights=clipped**2, minlength=len(mean))
    return np.where(varies, (n * mean**2 + squares - 2 * mean * total) / ((n - 1) * sd**2), 0.0)
