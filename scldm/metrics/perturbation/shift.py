"""The mean shift of a treatment in other contexts, as a change of counts: the answer that costs nothing.

A gene rises by a share of the cell's counts, or falls by a ratio. Molecules are added to a cell, or lost one by one, so
that the result is counts with the noise of counts.

Shape letters: n cells, g genes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from scldm.errors import InputError
from scldm.metrics.genes.expression import as_counts, library_sizes
from scldm.metrics.perturbation.screen import Screen

PSEUDO = 1e-6  # share of a cell's counts that keeps a ratio of two means finite


@dataclass(frozen=True)
class CountShift:
    """What a treatment does to the counts of a cell, from contexts in which it was measured."""

    rise: np.ndarray  # (g,) mean change of a gene's share of the cell
    ratio: np.ndarray  # (g,) geometric mean of the ratios of shares
    sources: tuple[str, ...]  # contexts that it was learned from

    @classmethod
    def learn(cls, screen: Screen, context: str, treatment: str) -> CountShift:
        """Average the changes over the other contexts that have both the treatment and the control.

        Args:
            screen: Measured cells; those of the combination itself are not used.
            context: Context that the shift is for.
            treatment: Its treatment.

        Raises:
            InputError: No other context has both.
        """
        sources = screen.sources(context, treatment)
        if not sources:
            raise InputError(
                f"{treatment!r} was measured beside {screen.control!r} in no context but {context!r}: nothing is known "
                "of it for free"
            )
        pairs = [(shares(screen, c, treatment), shares(screen, c, screen.control)) for c in sources]
        rise = np.mean([t - c for t, c in pairs], axis=0)
        ratio = np.exp(np.mean([np.log((t + PSEUDO) / (c + PSEUDO)) for t, c in pairs], axis=0))
        return cls(rise, ratio, tuple(sources))

    @property
    def kept(self) -> np.ndarray:
        """Probability that a molecule stays, (g,): 1 of genes that rise."""
        return np.where(self.rise > 0, 1.0, np.minimum(self.ratio, 1.0))

    @property
    def added(self) -> np.ndarray:
        """Molecules that are added for each count of the cell, (g,): 0 of genes that fall."""
        return np.maximum(self.rise, 0)

    def expected(self, counts: sp.csr_matrix) -> np.ndarray:
        """Return the expected counts of cells (n, g) after the shift, (n, g)."""
        x = as_counts(counts)
        return x.toarray() * self.kept + np.outer(library_sizes(x), self.added)

    def apply(self, counts: sp.csr_matrix, rng: np.random.Generator) -> sp.csr_matrix:
        """Draw the counts of cells (n, g) after the shift, (n, g)."""
        x = as_counts(counts)
        left = rng.binomial(x.data.astype(np.int64), self.kept[x.indices])
        thinned = sp.csr_matrix((left.astype(np.float64), x.indices, x.indptr), shape=x.shape)
        new = sp.csr_matrix(rng.poisson(np.outer(library_sizes(x), self.added)).astype(np.float64))
        return as_counts(thinned + new)


def shares(screen: Screen, context: str, treatment: str) -> np.ndarray:
    """Return the share of each gene in the counts of a combination's mean cell, (g,)."""
    counts = as_counts(screen.cells(context, treatment))
    size = library_sizes(counts)
    inverse = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    return (inverse @ counts) / len(size)
