"""Entries of a count matrix: the coordinate form, in which stores and files return counts.

Shape letters: n entries, g genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CountEntries:
    """Stored values with their cell and gene; the arrays may be read-only."""

    cells: np.ndarray  # (n,) whole numbers
    genes: np.ndarray  # (n,) whole numbers
    counts: np.ndarray  # (n,); not counts yet where they are still to be checked

    @classmethod
    def joined(cls, parts: Sequence[CountEntries]) -> CountEntries:
        """Concatenate parts, of which there is at least one."""
        return cls(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("cells", "genes", "counts")))

    def of_genes(self, genes: np.ndarray) -> CountEntries:
        """Return the entries of some genes, given as bool (g,)."""
        chosen = genes[self.genes]
        return CountEntries(self.cells[chosen], self.genes[chosen], self.counts[chosen])
