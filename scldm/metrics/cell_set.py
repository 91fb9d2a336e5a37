"""Cells to be compared: counts over the vocabulary, and the class of each cell for every label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

LABELS = "+"  # joins the names of labels that are crossed
CLASSES = "\x1f"  # joins the names of their classes; no class is named with it, as one may be with a plus


@dataclass(frozen=True)
class CellSet:
    """Counts over the vocabulary and class names per label (None where no label was given)."""

    counts: sp.csr_matrix  # (n, g)
    labels: Mapping[str, np.ndarray]  # label -> (n,) of str or None

    def __post_init__(self) -> None:
        for name, values in self.labels.items():
            if len(values) != self.n_cells:
                raise ValueError(f"label {name!r} has {len(values)} values for {self.n_cells} cells")

    @property
    def n_cells(self) -> int:
        return self.counts.shape[0]

    def __getitem__(self, index: np.ndarray) -> CellSet:
        return CellSet(self.counts[index], {k: v[index] for k, v in self.labels.items()})

    def crossed(self, labels: Sequence[str]) -> np.ndarray:
        """Class names of several labels joined, (n,); None where one of them is missing; "" for no labels at all."""
        if not labels:
            return np.full(self.n_cells, "", dtype=object)
        rows = zip(*(self.labels[name] for name in labels), strict=True)
        keys = [CLASSES.join(row) if all(isinstance(v, str) for v in row) else None for row in rows]
        return np.array(keys, dtype=object)


def label_sets(labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What is compared within classes: every label, and, where there are several, the crossing of them all."""
    single: dict[str, tuple[str, ...]] = {name: (name,) for name in labels}
    return single if len(labels) < 2 else single | {LABELS.join(labels): tuple(labels)}


def shown(key: str | None) -> str:
    """A crossed class as it is written for a reader."""
    return "none" if key is None else key.replace(CLASSES, " + ")
