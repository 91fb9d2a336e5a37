"""Measured counts of cells, and what the decoder expects of them before and after a change.

Shape letters: b cells, g genes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Change:
    """Counts, and their distribution before a change and after it.

    Raises:
        ValueError: The arrays do not fit.
    """

    counts: np.ndarray  # (b, g) whole numbers >= 0
    before: np.ndarray  # means, (b, g), finite and >= 0
    after: np.ndarray  # means, (b, g)
    theta: np.ndarray  # inverse dispersions, (1, g) or (b, g), > 0; infinite: counts are a Poisson of the mean

    def __post_init__(self) -> None:
        shapes = self.counts.shape, self.before.shape, self.after.shape
        if len(set(shapes)) > 1 or self.theta.shape not in (self.counts.shape, (1, *self.counts.shape[1:])):
            names = ("counts", "before", "after", "theta")
            named = ", ".join(f"{n} {s}" for n, s in zip(names, (*shapes, self.theta.shape), strict=True))
            raise ValueError(f"the arrays of a change do not fit: {named}")

    def __getitem__(self, rows: np.ndarray | slice) -> Change:
        theta = self.theta if len(self.theta) == 1 else self.theta[rows]
        return Change(self.counts[rows], self.before[rows], self.after[rows], theta)

    def times(self, factors: np.ndarray) -> Change:
        """Return the change with other means after it: times factors, (g,) or (b, g)."""
        return replace(self, after=self.after * factors)

    @property
    def kept_share(self) -> np.ndarray:
        """Probability that a molecule stays, 1 where a mean rises, (b, g)."""
        share = np.divide(self.after, self.before, out=np.ones_like(self.after), where=self.before > 0)
        return np.minimum(share, 1.0)

    @property
    def rate_of_counts(self) -> np.ndarray:
        """What the counts make of the rate that a cell has, over the mean before the change, (b, g)."""
        poisson = np.isinf(self.theta)
        theta = np.where(poisson, 1.0, self.theta)
        return np.where(poisson, 1.0, (theta + self.counts) / (theta + self.before))

    @property
    def gain(self) -> np.ndarray:
        """Mean of the molecules that are added, given the counts, (b, g); 0 where a mean falls."""
        return np.maximum(self.after - self.before, 0) * self.rate_of_counts
