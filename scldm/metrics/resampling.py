"""How far a score would move with other cells: intervals from random halves.

The bootstrap gives each cell a random weight of mean 1 and variance 1. Drawing with replacement does so by copies, and
a copy is its own nearest neighbour, which breaks every score of neighbours. Here the weights are 0 and 2: a random
*half* of the cells, without replacement. To first and second order its spread about the full sample is the same
(Præstgaard & Wellner 1993, exchangeable weights; Shao & Wu 1989, the delete-half jackknife), and no cell occurs twice.

A score of n/2 cells is biased against one of n (a distance grows as samples shrink). So only the *spread* of the halves
is used: the interval is value ± t sd, with t of Student's law for the number of halves. It says where the score of as
many other cells from the same sources would fall; it does not remove a bias that the number of cells brings, which
the floor, of as many cells, has too.

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
        """Half of the cells of every stratum (rounded to either side at random), `n_resamples` times.

        Halved within strata because candidates are made to real's composition: composition is no source of spread.

        Args:
            strata: Combination of labels of each cell, (n,); None is a stratum of its own.
        """
        n = len(strata)
        if n < 4:
            raise ValueError(f"halves need at least 4 cells; got {n}")
        codes = np.unique(strata.astype(str), return_inverse=True)[1]
        chosen = np.zeros((n_resamples, n), dtype=bool)
        for row in chosen:
            order = np.lexsort((rng.random(n), codes))  # shuffled inside strata: every second one is a half of each
            row[order[rng.integers(2) :: 2]] = True
        return cls(chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def weights(self) -> np.ndarray:
        """(1 + r, n), rows sum to 1; the first row is all cells."""
        both = np.concatenate([np.ones((1, self.chosen.shape[1])), self.chosen])
        return both / both.sum(1, keepdims=True)

    def members(self, k: int, among: np.ndarray | None = None) -> np.ndarray:
        """Positions of the cells of half k; of those of `among` (positions), places in it."""
        return np.flatnonzero(self.chosen[k] if among is None else self.chosen[k, among])


def half_width(replicates: np.ndarray, level: float = LEVEL) -> float:
    """t sd of scores of r halves, half the width of the interval about the score of all cells.

    t is the (1 + level) / 2 quantile of Student's law with r - 1 degrees of freedom: few resamples give a wider
    interval, not a bolder one.
    """
    if len(replicates) < 2:
        raise ValueError(f"an interval needs at least 2 resamples; got {len(replicates)}")
    if np.ptp(replicates) <= 1e-12 * abs(replicates).max():
        return 0.0  # what is left is rounding
    return float(student.ppf((1 + level) / 2, len(replicates) - 1) * np.std(replicates, ddof=1))
