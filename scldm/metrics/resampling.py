"""Confidence intervals of scores from random halves of the cells.

The bootstrap gives each cell a random weight of mean 1 and variance 1. Drawing with replacement does so by copies, and
a copy is its own nearest neighbour, which breaks every score based on neighbours. Here the weights are 0 and 2: a
random *half* of the cells, without replacement. To first and second order its spread about the full sample is the same
(Præstgaard & Wellner 1993, exchangeable weights; Shao & Wu 1989, the delete-half jackknife), and no cell occurs twice.

A score of n/2 cells is biased against one of n (a distance grows as samples shrink). So only the *spread* of the halves
is used: the interval is value ± t sd, with t of Student's distribution for the number of halves. It covers the score of
as many other cells from the same sources; it does not remove the bias of a finite number of cells, which the floor, of
as many cells, has too.

Shape letters: n cells, r resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

LEVEL = 0.95


@dataclass(frozen=True)
class Halves:
    """Random halves of n cells."""

    chosen: np.ndarray  # (r, n) bool

    @classmethod
    def draw(cls, strata: np.ndarray, n_resamples: int, rng: np.random.Generator) -> Halves:
        """Draw half of the cells of every stratum (rounded to either side at random), `n_resamples` times.

        Halves are drawn within strata because candidates have the real cells' composition by construction, so that it
        is not a source of spread.

        Args:
            strata: Combination of labels of each cell, (n,); None is a stratum of its own.
            n_resamples: Number of halves, r.
            rng: Source of the draws.
        """
        n = len(strata)
        if n < 4:
            raise ValueError(f"halves need at least 4 cells; got {n}")
        codes = np.unique(strata.astype(str), return_inverse=True)[1]
        chosen = np.zeros((n_resamples, n), dtype=bool)
        for row in chosen:
            order = np.lexsort((rng.random(n), codes))  # shuffled within strata: every second one is a half of each
            row[order[rng.integers(2) :: 2]] = True
        return cls(chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def weights(self) -> np.ndarray:
        """Weights of all cells and of each half, (1 + r, n); rows sum to 1 and the first row is all cells."""
        both = np.concatenate([np.ones((1, self.chosen.shape[1])), self.chosen])
        return both / both.sum(1, keepdims=True)

    def members(self, k: int, among: np.ndarray | None = None) -> np.ndarray:
        """Return the positions of the cells of half k, or of those in `among`, as places in `among`."""
        return np.flatnonzero(self.chosen[k] if among is None else self.chosen[k, among])


def half_width(replicates: np.ndarray, level: float = LEVEL) -> float:
    """Return t sd of the scores of r halves: half the width of the interval about the score of all cells.

    t is the (1 + level) / 2 quantile of Student's distribution with r - 1 degrees of freedom, so that few resamples
    give a wider interval.
    """
    if len(replicates) < 2:
        raise ValueError(f"an interval needs at least 2 resamples; got {len(replicates)}")
    if np.ptp(replicates) <= 1e-12 * abs(replicates).max():
        return 0.0  # the rest is rounding
    return float(student.ppf((1 + level) / 2, len(replicates) - 1) * np.std(replicates, ddof=1))
