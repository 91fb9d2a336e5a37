"""How near an answer is to the measured cells of a combination: shift, differential expression, distribution.

All are of log1p CP10k. The *shift* of cells is their mean minus the mean of the context's measured control cells.

    delta_pearson            correlation of the two shifts, all genes; …_top20, 50, 100: of the genes that change most
                             (the smallest p-values, then the largest changes)
    lfc_cosine, lfc_slope    of log2 fold changes of mean counts per 10,000
    mae, rmse                of the mean
    pr_auc                   of the genes that are differentially expressed (Wilcoxon, FDR 5 %) among measured cells,
                             ranked by the answer's p-values
    des                      share of these genes that the answer calls too; of an answer that calls more, those of
                             largest change count (Virtual Cell Challenge)
    energy, mmd2             distances to the measured cells in a space, without bias: 0 on average for equal sets

`ranks` compares an answer with all treatments (PerturBench's rank; the challenge's discrimination score).

Shape letters: n cells, g genes, p coordinates, t treatments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control, mannwhitneyu, rankdata

from scldm.errors import extra
from scldm.metrics.distribution.distances import median_distance
from scldm.metrics.genes.fold_change import log_fold_change, recovery

with extra("score"):
    from sklearn.metrics import average_precision_score

FDR = 0.05
TOP = (20, 50, 100)  # genes
GENES = 512  # tested at a time
LOWER = frozenset({"mae", "rmse", "energy", "mmd2", "rank"})  # smaller is better


@dataclass(frozen=True)
class Change:
    """Differential expression of some cells against controls, of each gene (g,)."""

    shift: np.ndarray  # of the mean log1p CP10k
    lfc: np.ndarray  # log2 fold change of mean counts per 10,000
    p_value: np.ndarray  # Wilcoxon rank-sum, two-sided

    @classmethod
    def of(cls, cells: np.ndarray, control: np.ndarray) -> Change:
        """Compare cells (n, g) with control cells, both log1p CP10k."""
        means = [np.expm1(x).mean(0) for x in (cells, control)]
        return cls(cells.mean(0) - control.mean(0), log_fold_change(*means), rank_sum_p_values(cells, control))

    @property
    def significant(self) -> np.ndarray:
        """Genes with a false discovery rate of at most 5 % (Benjamini and Hochberg), bool (g,)."""
        return false_discovery_control(self.p_value) <= FDR

    @property
    def order(self) -> np.ndarray:
        """Genes by p-value, equal ones by the size of their change, (g,)."""
        return np.lexsort((-np.abs(self.shift), self.p_value))


def rank_sum_p_values(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return p-values of Wilcoxon's rank-sum test, normal approximation with ties, (g,); 1 for a constant gene."""
    found = np.ones(x.shape[1])
    for first in range(0, x.shape[1], GENES):
        part = slice(first, first + GENES)
        a, b = x[:, part], y[:, part]
        varies = np.maximum(a.max(0), b.max(0)) > np.minimum(a.min(0), b.min(0))
        if varies.any():
            test = mannwhitneyu(a[:, varies], b[:, varies], axis=0, method="asymptotic")
            found[first + np.flatnonzero(varies)] = test.pvalue
    return found


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of two vectors; 0 if one of them does not vary, because nothing is then recovered."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else 0.0


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two vectors; 0 if one of them is zero."""
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else 0.0


def shift_scores(real: Change, answer: Change) -> dict[str, float]:
    """Return the scores of an answer's mean and of its differential expression."""
    found = {"delta_pearson": pearson(real.shift, answer.shift)}
    for n in TOP:
        if n < len(real.shift):
            genes = real.order[:n]
            found[f"delta_pearson_top{n}"] = pearson(real.shift[genes], answer.shift[genes])
    found["lfc_cosine"] = cosine(real.lfc, answer.lfc)
    if real.lfc.any():
        found["lfc_slope"] = recovery(real.lfc, answer.lfc)[1]
    error = answer.shift - real.shift
    found |= {"mae": float(np.abs(error).mean()), "rmse": float(np.sqrt((error**2).mean()))}
    called = real.significant
    if called.any() and not called.all():
        certainty = -rankdata(answer.p_value, method="average")
        found["pr_auc"] = float(average_precision_score(called, certainty))
    if called.any():
        found["des"] = _overlap(called, answer)
    return found


def _overlap(called: np.ndarray, answer: Change) -> float:
    """Return the share of the genes that are called which the answer calls too."""
    genes, n = np.flatnonzero(answer.significant), int(called.sum())
    if len(genes) > n:
        genes = genes[np.argsort(-np.abs(answer.lfc[genes]), kind="stable")[:n]]
    return float(called[genes].sum() / n)


def distances(real: np.ndarray, answer: np.ndarray) -> dict[str, float]:
    """Return the distances of an answer's cells (m, p) to measured ones (n, p), without bias (U-statistics).

    The floor has half as many cells as an answer, and the usual V-statistics, which count the distance of a cell to
    itself, would be larger for it. These are 0 on average for equal distributions, whatever the number of cells, and
    so may be a little below.
    """
    d = _pairwise(real, answer)
    sigma = median_distance(real)
    return {"energy": -_discrepancy(d, len(real)), "mmd2": _discrepancy(np.exp(-(d**2) / (2 * sigma**2)), len(real))}


def _pairwise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the Euclidean distances among the points of x and y together, (n + m, n + m)."""
    z = np.concatenate([x, y])
    squares = (z**2).sum(1)
    d = np.sqrt(np.maximum(squares[:, None] + squares - 2 * z @ z.T, 0))
    np.fill_diagonal(d, 0)
    return d


def _discrepancy(k: np.ndarray, n: int) -> float:
    """Return the mean of k within the first n points, plus that within the others, minus twice that across."""
    means = []
    for part in (k[:n, :n], k[n:, n:]):
        means.append((part.sum() - np.trace(part)) / (len(part) * (len(part) - 1)))
    return float(means[0] + means[1] - 2 * k[:n, n:].mean())


def resampled_energies(x: np.ndarray, y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the energy distance of x (n, p) and y (m, p) under weights u (r, n) and v (r, m), (r,).

    Weights are those of cells drawn with replacement. A cell that is drawn twice is at distance 0 from its copy, so
    that the sums within a side are too small by 1 / n on average; that and the bias of `distances` are divided out.
    """
    d, n, m = _pairwise(x, y), len(x), len(y)
    across = ((u @ d[:n, n:]) * v).sum(1)
    inside = ((u @ d[:n, :n]) * u).sum(1) / (1 - 1 / n) ** 2
    other = ((v @ d[n:, n:]) * v).sum(1) / (1 - 1 / m) ** 2
    return 2 * across - inside - other


def ranks(answer: np.ndarray, measured: Mapping[str, np.ndarray], own: str) -> dict[str, float]:
    """Return how well an answer's shift tells its treatment from all others.

    Args:
        answer: Shift of the answer, (g,).
        measured: Treatment -> measured shift in the same context, (g,); at least two.
        own: The treatment that was asked for.

    Returns:
        rank: Share of the other treatments whose shift is nearer to the answer (cosine), 0 at best, 0.5 by chance.
        pds: 1 - the same by Manhattan distance, 1 at best.
    """
    others = [name for name in measured if name != own]
    if not others:
        return {}
    near, far = cosine(answer, measured[own]), float(np.abs(answer - measured[own]).sum())
    nearer = [cosine(answer, measured[name]) > near for name in others]
    closer = [float(np.abs(answer - measured[name]).sum()) < far for name in others]
    return {"rank": float(np.mean(nearer)), "pds": 1.0 - float(np.mean(closer))}
