"""A perturbation screen: cells of contexts (cell types, donors) under treatments, one of which is the control.

A *combination* is a context under a treatment. All that is said of a held-out combination is computed from a screen
without its cells.

Shape letters: n cells, g genes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from scldm.errors import InputError
from scldm.metrics.genes.expression import as_counts, log1p_cp10k
from scldm.text import choices_hint

Combination = tuple[str, str]  # context, treatment
MIN_CELLS = 5  # of a combination whose mean is used


@dataclass(frozen=True)
class CellNumbers:
    """How many cells the combinations of a screen have: what can be asked for follows from it alone."""

    n: Mapping[Combination, int]  # of combinations that have cells
    control: str  # a treatment

    def sources(self, context: str, treatment: str) -> list[str]:
        """Return the other contexts in which both the treatment and the control were measured, in enough cells."""
        others = sorted({c for c, t in self.n if t == treatment and c != context})
        return [c for c in others if min(self.n[c, treatment], self.n.get((c, self.control), 0)) >= MIN_CELLS]


@dataclass(frozen=True)
class Screen:
    """Counts with a context and a treatment for each cell.

    Raises:
        InputError: No cell has the control treatment.
        ValueError: The arrays differ in length.
    """

    counts: sp.csr_matrix  # (n, g)
    context: np.ndarray  # (n,) names
    treatment: np.ndarray  # (n,) names
    control: str  # a treatment

    def __post_init__(self) -> None:
        n = self.counts.shape[0]
        if len(self.context) != n or len(self.treatment) != n:
            raise ValueError(f"{n} cells, but {len(self.context)} contexts and {len(self.treatment)} treatments")
        if self.control not in set(self.treatment):
            names = sorted({str(t) for t in self.treatment})
            raise InputError(
                f"no cell has the control treatment {self.control!r} ({choices_hint(self.control, names)})"
            )

    @cached_property
    def members(self) -> Mapping[Combination, np.ndarray]:
        """Positions of the cells of every combination that has cells, in order of names."""
        keys = np.char.add(np.char.add(self.context.astype(str), "\x1f"), self.treatment.astype(str))
        order = np.argsort(keys, kind="stable")
        names, starts = np.unique(keys[order], return_index=True)
        groups = np.split(order, starts[1:])
        pairs = [(name.partition("\x1f")[0], name.partition("\x1f")[2]) for name in names.tolist()]
        return dict(zip(pairs, groups, strict=True))

    @cached_property
    def numbers(self) -> CellNumbers:
        """How many cells every combination has."""
        return CellNumbers({pair: len(rows) for pair, rows in self.members.items()}, self.control)

    @cached_property
    def log(self) -> sp.csr_matrix:
        """log1p CP10k of all cells, (n, g)."""
        return log1p_cp10k(self.counts)

    def __getitem__(self, rows: np.ndarray) -> Screen:
        return Screen(as_counts(self.counts)[rows], self.context[rows], self.treatment[rows], self.control)

    def cells(self, context: str, treatment: str) -> sp.csr_matrix:
        """Return the counts of a combination, (k, g).

        Raises:
            InputError: It has no cells.
        """
        return self.counts[self._rows(context, treatment)]

    def mean(self, context: str, treatment: str) -> np.ndarray:
        """Return the mean of log1p CP10k over the cells of a combination, (g,).

        Raises:
            InputError: It has no cells.
        """
        return np.asarray(self.log[self._rows(context, treatment)].mean(0)).ravel()

    def sources(self, context: str, treatment: str) -> list[str]:
        """Return the other contexts in which both the treatment and the control were measured, in enough cells."""
        return self.numbers.sources(context, treatment)

    def without(self, pairs: Iterable[Combination]) -> Screen:
        """Return the screen without the cells of some combinations, which may have none."""
        none = np.zeros(0, dtype=np.int64)
        gone = np.concatenate([none, *(self.members.get(pair, none) for pair in pairs)])
        return self[np.setdiff1d(np.arange(len(self.context)), gone)] if len(gone) else self

    def with_controls(self, context: str, counts: sp.csr_matrix) -> Screen:
        """Return the screen with other control cells of a context, (k, g), in place of its own."""
        others, k = self.without([(context, self.control)]), counts.shape[0]
        return Screen(
            sp.vstack([as_counts(others.counts), as_counts(counts)], format="csr"),
            np.concatenate([others.context.astype(object), np.repeat(np.array([context], object), k)]),
            np.concatenate([others.treatment.astype(object), np.repeat(np.array([self.control], object), k)]),
            self.control,
        )

    def _rows(self, context: str, treatment: str) -> np.ndarray:
        if (context, treatment) not in self.members:
            raise InputError(f"no cell of {context!r} was measured under {treatment!r}")
        return self.members[context, treatment]
