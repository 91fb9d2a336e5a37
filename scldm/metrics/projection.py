"""The space in which clouds of cells are compared: fitted once on real training cells, then only applied.

log1p CP10k -> the most variable genes -> minus the real mean -> PCA. Generated cells are projected with the real
genes, mean and axes; a space refitted on them would bend towards their faults.

Rule for genes: highest variance of log1p CP10k over the real training cells, ties by position.

Shape letters: n cells, g genes of the vocabulary, h chosen genes, p coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA

from scldm.metrics.expression import chunks, gene_moments, log1p_cp10k


@dataclass(frozen=True)
class RealSpace:
    n_genes: int
    genes: np.ndarray  # (h,) positions in the vocabulary
    mean: np.ndarray  # (h,)
    axes: np.ndarray  # (p, h), orthonormal rows
    explained: np.ndarray  # (p,), share of the variance of the chosen genes

    @classmethod
    def fit(cls, real_train: sp.csr_matrix, *, n_top_genes: int, n_pcs: int, seed: int) -> RealSpace:
        """Choose genes and axes on real training counts.

        Args:
            real_train: Counts, (n, g).
            n_top_genes: Genes at most; a smaller vocabulary is taken whole.
            n_pcs: Coordinates; must be below the number of cells and of chosen genes.
            seed: Of the randomised SVD.
        """
        moments = gene_moments(chunks(real_train))
        genes = np.sort(np.argsort(-moments.variance, kind="stable")[:n_top_genes])
        if n_pcs >= min(real_train.shape[0], len(genes)):
            raise ValueError(
                f"n_pcs ({n_pcs}) must be below the number of training cells ({real_train.shape[0]}) and of chosen "
                f"genes ({len(genes)})"
            )
        dense = log1p_cp10k(real_train)[:, genes].toarray()
        pca = PCA(n_components=n_pcs, svd_solver="randomized", iterated_power=7, random_state=seed).fit(dense)
        return cls(real_train.shape[1], genes, pca.mean_, pca.components_, pca.explained_variance_ratio_)

    def project(self, counts: sp.csr_matrix) -> np.ndarray:
        """Coordinates of cells, (n, p)."""
        if counts.shape[1] != self.n_genes:
            raise ValueError(f"the space was fitted on {self.n_genes} genes; got cells with {counts.shape[1]}")
        parts = [(log1p_cp10k(part)[:, self.genes] @ self.axes.T) for part in chunks(sp.csr_matrix(counts))]
        return np.concatenate(parts) - self.axes @ self.mean
