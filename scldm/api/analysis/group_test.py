"""Do two groups of cells differ in the mean of a gene? A permutation test of a studentised log fold change.

Every cell has a value y and a weight w of each gene, and a group's mean is sum(w y) / sum(w). The statistic is

    t = log2((m1 + 1) / (m2 + 1)) / its standard error,

and its distribution comes from the same cells with the groups drawn anew. If both groups are cells of one population
the test is exact, whatever computed the values, a network too: it saw no groups. If only this gene's mean is equal and
the populations differ otherwise, it is exact in the limit of many cells, because the statistic is studentised (Chung &
Romano 2013, exact and asymptotically robust permutation tests).

A gene that fewer than `TAIL` permutations exceed has the smaller of two p-values: of the permutations, whose smallest
is 1 / (1 + r), and of Student's distribution with the degrees of freedom of the smaller group, scaled to the gene's own
permutations. A group's variance is taken to be at least the variance within both groups together: a small group that
happens to have no count of a gene would otherwise look certain.

Shape letters: n cells of both groups, b of them, g genes, r groupings (the first is the given one, the others drawn).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from scldm.metrics.genes.fold_change import PSEUDO, log_fold_change

GENES = 1_000  # whose statistics are held at once
TAIL = 10  # permutations that must exceed a gene for their share to be its p-value
SAME = 1 - 1e-9  # of a statistic: permutations this near are equal but for rounding


def draw_groupings(first: np.ndarray, n_permutations: int, rng: np.random.Generator) -> np.ndarray:
    """Return which cells are in the first group, (1 + n_permutations, n) bool: as given, then at random.

    Args:
        first: Whether each cell is in the first group, (n,); the others are in the second.
    """
    return np.stack([first, *(rng.permutation(first) for _ in range(n_permutations))])


class GroupSums:
    """Sums over the cells of both groups, in one pass over the cells, for all groupings.

    Args:
        groupings: (r, n) bool, see `draw_groupings`.
        n_genes: g. Memory is 24 r g bytes, and 16 without weights.
        weighted: Whether cells have weights.
    """

    def __init__(self, groupings: np.ndarray, n_genes: int, *, weighted: bool):
        self.groupings, self.weighted = groupings, weighted
        self.wy, self.w2y2 = (np.zeros((len(groupings), n_genes)) for _ in range(2))
        self.w2y = np.zeros((len(groupings), n_genes)) if weighted else self.wy
        self.total = np.zeros((3, n_genes))  # of w y, w² y² and w² y, over all cells
        self.weights = np.ones(groupings.shape[1])

    def add(self, start: int, wy: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Add cells start .. start + b - 1.

        Args:
            wy: Weight times value, (b, g).
            weights: (b,), > 0; None without weights.
        """
        cells = slice(start, start + len(wy))
        of_first, wy = self.groupings[:, cells].astype(np.float64), np.asarray(wy, dtype=np.float64)
        parts = [wy, wy**2]
        self.wy += of_first @ wy
        self.w2y2 += of_first @ parts[1]
        if self.weighted:
            assert weights is not None
            self.weights[cells] = weights
            parts.append(wy * np.asarray(weights, dtype=np.float64)[:, None])
            self.w2y += of_first @ parts[2]
        self.total += np.stack([part.sum(0) for part in (*parts, *([] if self.weighted else [wy]))])

    def means(self, genes: slice = slice(None)) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the mean of the first group and its variance as an estimate, and those of the second, (r, g) each."""
        first = [part[:, genes] for part in (self.wy, self.w2y2, self.w2y)]
        second = [total[genes] - part for total, part in zip(self.total, first, strict=True)]
        return *self._mean(self.groupings, *first), *self._mean(~self.groupings, *second)

    def sizes(self, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return number and sum of weights of the members (r, n) of a group, (r, 1) each."""
        return members.sum(1, keepdims=True), (members.astype(np.float64) @ self.weights)[:, None]

    def _mean(
        self, members: np.ndarray, wy: np.ndarray, w2y2: np.ndarray, w2y: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        n, weight = self.sizes(members)
        squared_weights = (members.astype(np.float64) @ self.weights**2)[:, None]
        mean = wy / weight
        spread = np.maximum(w2y2 - 2 * mean * w2y + mean**2 * squared_weights, 0.0)
        return mean, spread / weight**2 * n / np.maximum(n - 1, 1)


@dataclass(frozen=True)
class FoldChange:
    """Means of two groups and their log2 fold change, (g,) each."""

    mean1: np.ndarray
    mean2: np.ndarray
    variance1: np.ndarray  # of mean1 as an estimate
    variance2: np.ndarray

    @property
    def log2(self) -> np.ndarray:
        """log2((mean1 + 1) / (mean2 + 1))."""
        return log_fold_change(self.mean1, self.mean2)

    @property
    def variance(self) -> np.ndarray:
        """Variance of `log2` as an estimate, by the delta method."""
        return delta_method(self.mean1, self.mean2, self.variance1, self.variance2)


def delta_method(mean1: np.ndarray, mean2: np.ndarray, variance1: np.ndarray, variance2: np.ndarray) -> np.ndarray:
    """Return the variance of a log2 fold change, elementwise."""
    return (variance1 / (mean1 + PSEUDO) ** 2 + variance2 / (mean2 + PSEUDO) ** 2) / np.log(2) ** 2


def of_given(sums: GroupSums) -> FoldChange:
    """Return means and fold change of the given groups."""
    mean1, variance1, mean2, variance2 = (x[0] for x in sums.means())
    return FoldChange(mean1, mean2, variance1, variance2)


def p_values(sums: GroupSums) -> np.ndarray:
    """Return the two-sided p-value of each gene, (g,); 1 where nothing varies."""
    n_genes = sums.wy.shape[1]
    parts = [_p_values(sums, slice(start, start + GENES)) for start in range(0, n_genes, GENES)]
    return np.concatenate([np.zeros(0), *parts])


def _p_values(sums: GroupSums, genes: slice) -> np.ndarray:
    t = _statistics(sums, genes)
    size, drawn = abs(t[0]), abs(t[1:])
    exceeding = (drawn >= size * SAME).sum(0)
    p = (1 + exceeding) / (1 + len(drawn))
    smaller = min(int(sums.groupings[0].sum()), int((~sums.groupings[0]).sum()))
    scale = np.maximum(np.sqrt((drawn**2).mean(0)), 1.0)
    tail = 2 * student.sf(size / scale, max(smaller - 1, 1))
    return np.where((exceeding < TAIL) & (size > 0), np.minimum(p, tail), p)


def _statistics(sums: GroupSums, genes: slice) -> np.ndarray:
    """Return t of all groupings, (r, g); 0 where nothing varies."""
    mean1, variance1, mean2, variance2 = sums.means(genes)
    (n1, weight1), (n2, weight2) = sums.sizes(sums.groupings), sums.sizes(~sums.groupings)
    within = (variance1 * weight1 * (n1 - 1) + variance2 * weight2 * (n2 - 1)) / np.maximum(n1 + n2 - 2, 1)
    squared = delta_method(
        mean1, mean2, np.maximum(variance1, within / weight1), np.maximum(variance2, within / weight2)
    )
    return np.divide(log_fold_change(mean1, mean2), np.sqrt(squared), out=np.zeros_like(mean1), where=squared > 0)
