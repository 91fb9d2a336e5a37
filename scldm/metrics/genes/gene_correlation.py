"""Gene-gene correlations: do genes vary together in generated cells as in real ones?

Marginal statistics of genes cannot tell: shuffling every gene among the cells keeps all of them and breaks this one.

Shape letters: n cells, h genes.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from scldm.metrics.score import Score
from scldm.metrics.side import Side

TOP = 200  # genes: 19,900 pairs; more would be pairs of genes that are zero in nearly all cells


def correlation_matrix(x: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of the columns of x (n, h), (h, h); 0 with a constant column."""
    centred = x - x.mean(0)
    norm = np.sqrt((centred**2).sum(0))
    varies = np.ptp(x, axis=0) > 0
    scaled = np.divide(centred, norm, out=np.zeros_like(centred), where=varies & (norm > 0))
    return scaled.T @ scaled


def correlation_agreement(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """Return the agreement of two gene-gene correlation matrices over the pairs of different genes.

    The first number is the Pearson correlation of the pairs' coefficients (higher is better, 1 at best; 0 if the
    generated ones do not vary), the second their mean absolute difference (lower is better, 0 at best). Estimation
    noise of the coefficients, about 1/sqrt(n), lowers the first and raises the second for any candidate: compare with
    the floor.
    """
    upper = np.triu_indices(real.shape[1], 1)
    a, b = correlation_matrix(real)[upper], correlation_matrix(generated)[upper]
    if np.ptp(a) == 0:
        raise ValueError(f"gene-gene correlations of {real.shape[0]} real cells do not vary: no agreement is defined")
    pearson = 0.0 if np.ptp(b) == 0 else float(np.corrcoef(a, b)[0, 1])
    return pearson, float(abs(a - b).mean())


def gene_correlation_scores(real: Side, candidate: Side, top: int = TOP) -> dict[str, Score]:
    """Score correlations on log1p CP10k of the `top` genes of highest variance in the held-out real cells."""
    genes = np.sort(np.argsort(-real.moments.variance, kind="stable")[:top])
    x, y = _dense(real.log_values, genes), _dense(candidate.log_values, genes)
    value = correlation_agreement(x, y)
    halves = [
        correlation_agreement(x[real.halves.members(k)], y[candidate.halves.members(k)])
        for k in range(len(real.halves))
    ]
    pearson, difference = np.array(halves).reshape(-1, 2).T
    names = f"top {len(genes)} genes"
    return {
        "gene_correlation_pearson": Score(
            value[0], "higher", 1.0, "expression", f"gene–gene correlations, Pearson ({names})", pearson, (-1.0, 1.0)
        ),
        "gene_correlation_difference": Score(
            value[1], "lower", 0.0, "expression", f"gene–gene correlations, mean |difference| ({names})", difference,
            (0.0, 2.0),
        ),
    }  # fmt: skip


def _dense(x: sp.csr_matrix, genes: np.ndarray) -> np.ndarray:
    return x[:, genes].toarray()
