"""Cell sets that metrics compare: counts over the vocabulary, and the class of each cell for every label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

LABELS = "+"  # joins the names of labels that are crossed
CLASSES = "\x1f"  # joins the names of their classes; unlike a plus, no class name contains it


@dataclass(frozen=True)
class CellSet:
    """Counts over the vocabulary and class names per label (None if a cell has no label)."""

    counts: sp.csr_matrix  # (n, g)
    labels: Mapping[str, np.ndarray]  # label -> (n,) of str or None

    def __post_init__(self) -> None:
        for name, values in self.labels.items():
            if len(values) != self.n_cells:
                raise ValueError(f"label {name!r} has {len(values)} values for {self.n_cells} cells")

    @property
    def n_cells(self) -> int:
        """Number of cells, n."""
        return self.counts.shape[0]

    def __getitem__(self, index: np.ndarray) -> CellSet:
        return CellSet(self.counts[index], {k: v[index] for k, v in self.labels.items()})

    def crossed(self, labels: Sequence[str]) -> np.ndarray:
        """Return the class names of several labels joined, (n,).

        None for a cell that lacks one of the labels; "" if there are no labels.
        """
        if not labels:
            return np.full(self.n_cells, "", dtype=object)
        rows = zip(*(self.labels[name] for name in labels), strict=True)
        keys = [CLASSES.join(row) if all(isinstance(v, str) for v in row) else None for row in rows]
        return np.array(keys, dtype=object)


def label_sets(labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the labels to compare within: every label and, if there are several, the combination of all."""
    single: dict[str, tuple[str, ...]] = {name: (name,) for name in labels}
    return single if len(labels) < 2 else single | {LABELS.join(labels): tuple(labels)}


def class_text(key: str | None) -> str:
    """Format a combined class for readers."""
    return "none" if key is None else key.replace(CLASSES, " + ")
