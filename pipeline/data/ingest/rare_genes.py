"""Counts of genes that may yet turn out too rare to keep, held during a pass over all cells.

Whether a gene is expressed in enough cells is known only at the end, and then its counts must be taken out of the
library sizes. A gene that has reached the number is let go at once, so what is held is at most about so many entries
for each gene; if that is too much all the same, nothing is held and the caller reads again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MOST_HELD = 20_000_000  # entries, 16 bytes each


@dataclass(frozen=True)
class Entries:
    """Single counts."""

    cell: np.ndarray  # int64
    gene: np.ndarray  # int32
    count: np.ndarray  # float32

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        return cls(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("cell", "gene", "count")))

    def of(self, genes: np.ndarray) -> Entries:
        """Those of some genes, bool (g,)."""
        chosen = genes[self.gene]
        return Entries(self.cell[chosen], self.gene[chosen], self.count[chosen])


@dataclass
class HeldEntries:
    """Entries of the genes that are undecided."""

    parts: list[Entries] = field(default_factory=list)
    size: int = 0
    tidied: int = 0  # size after the last letting go

    def add(self, entries: Entries, first_cell: int, undecided: np.ndarray) -> bool:
        """Hold the entries of a part. False if it is too much, and nothing should be held any more.

        Args:
            entries: Cells counted from the first of the part.
            first_cell: Number of that cell.
            undecided: Genes that may yet be left out, bool (g,).
        """
        part = entries.of(undecided)
        self.parts.append(Entries(part.cell + first_cell, part.gene, part.count))
        self.size += len(part.gene)
        if self.size > min(MOST_HELD, 2 * max(self.tidied, MOST_HELD // 8)):
            self.parts = [Entries.joined(self.parts).of(undecided)]
            self.size = self.tidied = len(self.parts[0].gene)
        return self.size <= MOST_HELD

    def of_cells(self, genes: np.ndarray, n_cells: int) -> tuple[np.ndarray, np.ndarray]:
        """Sum of the counts of some genes in each cell, and their number, (n_cells,)."""
        if not self.parts:
            return np.zeros(n_cells), np.zeros(n_cells, np.int64)
        found = Entries.joined(self.parts).of(genes)
        total = np.bincount(found.cell, found.count.astype(np.float64), minlength=n_cells)
        return total, np.bincount(found.cell, minlength=n_cells)
