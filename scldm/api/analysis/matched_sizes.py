"""Give two groups of cells the same library sizes, by leaving out molecules of the deeper cells.

An encoder sees a shallow cell less clearly than a deep one, so that two groups of one population with different library
sizes differ in what a model makes of them. A cell of rank q in its group keeps as many molecules as the cell of that
rank in the group that has fewer. Which molecules stay is drawn without replacement: given its library size, a cell that
was measured less deeply looks so.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp


def matched_sizes(sizes: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return how many molecules each cell keeps, (n,) int64: at least 1, at most those it has.

    Args:
        sizes: Library sizes, (n,), > 0.
        first: Which cells are in the first group, (n,) bool.
    """
    kept = np.rint(sizes).astype(np.int64)
    for own, other in ((first, ~first), (~first, first)):
        rank = np.empty(own.sum())
        rank[np.argsort(sizes[own], kind="stable")] = (np.arange(own.sum()) + 0.5) / own.sum()
        theirs = np.quantile(sizes[other], rank, method="hazen")
        kept[own] = np.minimum(kept[own], np.maximum(np.rint(theirs).astype(np.int64), 1))
    return kept


def thinned(counts: sp.csr_matrix, kept: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """Return counts with `kept` (n,) molecules of each cell, drawn without replacement; float32 CSR like the counts."""
    out = counts.copy()
    sizes = np.asarray(counts.sum(1)).ravel()
    for cell in np.flatnonzero(kept < sizes):
        own = slice(counts.indptr[cell], counts.indptr[cell + 1])
        out.data[own] = rng.multivariate_hypergeometric(counts.data[own].astype(np.int64), int(kept[cell]))
    out.eliminate_zeros()
    return out
