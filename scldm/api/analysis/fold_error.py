"""How far is a model's fold change from the truth? Bounded by the genes' own counts.

A gene's own counts give a fold change l that is right on average, with a variance v from the sampling of cells. The
model gives d, which borrows from other genes. With A = E (d - l)² and c the covariance of both about the truth,

    E (d - truth)² = A - v + 2 c.

How far d follows the noise of the gene's own counts, c / v, is not known where the model was trained on the cells that
are compared. If it is at most a half, the error² of d is at most A; if d follows it whole, at most A + v. A is a mean
over genes of similar mean expression, so that the bound is right on average over such genes, not for one gene.

Fold changes have one count per 10,000 added to each mean, which shrinks those of rare genes by m / (m + 1); A is
averaged without this.

Shape letters: g genes.
"""

from __future__ import annotations

import numpy as np

from scldm.metrics.genes.fold_change import PSEUDO

GENES_OF_BIN = 50  # at least
BINS = 20  # at most


def squared_distance(model: np.ndarray, counts: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return A of each gene, (g,).

    Args:
        model: Log2 fold changes d by the model, (g,).
        counts: Log2 fold changes l by the genes' own counts.
        mean: Mean expression of both groups by the model, counts per 10,000.
    """
    shrunk = np.maximum(mean, 1e-3) / (np.maximum(mean, 1e-3) + PSEUDO)
    apart, found = ((model - counts) / shrunk) ** 2, np.zeros(len(model))
    n_bins = int(np.clip(len(model) // GENES_OF_BIN, 1, BINS))
    for genes in np.array_split(np.argsort(mean, kind="stable"), n_bins):
        found[genes] = apart[genes].mean() if len(genes) else 0.0
    return found * shrunk**2
