"""One side of a comparison: cells, their coordinates and halves, and what is derived from these once.

Shape letters: n cells, g genes, p coordinates, r resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from scldm.metrics.cell_set import CellSet
from scldm.metrics.genes import expression
from scldm.metrics.genes.expression import GeneMoments
from scldm.metrics.resampling import Halves


@dataclass(frozen=True, eq=False)
class Side:
    """Cells of one side of a comparison: held-out real cells, or a candidate.

    Attributes:
        refits: Number of halves (the first ones) for scores that are computed from scratch.
        order: A fixed random order of the cells; a score of fewer cells takes the first ones.
    """

    cells: CellSet
    points: np.ndarray  # (n, p)
    halves: Halves
    refits: int
    order: np.ndarray  # (n,)

    @classmethod
    def create(
        cls,
        cells: CellSet,
        points: np.ndarray,
        strata: np.ndarray,
        *,
        resamples: int,
        refits: int,
        key: tuple[int, ...],
    ) -> Side:
        """Draw the halves and the order of the cells; they depend on `key` only."""
        rng = np.random.default_rng(key)
        return cls(cells, points, Halves.draw(strata, resamples, rng), refits, rng.permutation(cells.n_cells))

    @property
    def n_cells(self) -> int:
        """Number of cells, n."""
        return self.cells.n_cells

    @cached_property
    def weights(self) -> np.ndarray:
        """Weights of all cells and of each half, (1 + r, n); the first row is all cells."""
        return self.halves.weights

    @cached_property
    def moments(self) -> GeneMoments:
        """Moments of the genes over all cells."""
        return expression.moments_of(self.cells.log_chunks())

    @cached_property
    def half_moments(self) -> list[GeneMoments]:
        """Moments of the genes over each half, r of them."""
        return expression.weighted_gene_moments(self.log_values, self.weights[1:])

    @cached_property
    def log_values(self) -> sp.csr_matrix:
        """Values as log1p CP10k, (n, g)."""
        return self.cells.log_values

    def half(self, k: int) -> np.ndarray:
        """Return the points of half k, in the fixed order."""
        return self.points[self.order[self.halves.members(k, self.order)]]
