"""Cell sets that metrics compare: counts over the vocabulary, and the class of each cell for every label.

A model with a Gaussian head generates no counts but log1p CP10k values, one for each gene and some below zero. Such
cells are compared with real cells on that scale. They have no library size, no zeros and no counts: asking for their
counts is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from scldm.metrics.genes import expression

LABELS = "+"  # joins the names of labels that are crossed
CLASSES = "\x1f"  # joins the names of their classes; unlike a plus, no class name contains it


@dataclass(frozen=True)
class CellSet:
    """Values over the vocabulary and class names per label (None if a cell has no label)."""

    values: sp.csr_matrix  # (n, g), counts or log1p CP10k
    labels: Mapping[str, np.ndarray]  # label -> (n,) of str or None
    counted: bool = True  # whether the values are counts

    def __post_init__(self) -> None:
        for name, values in self.labels.items():
            if len(values) != self.n_cells:
                raise ValueError(f"label {name!r} has {len(values)} values for {self.n_cells} cells")

    @property
    def n_cells(self) -> int:
        """Number of cells, n."""
        return int(self.values.shape[0])

    @property
    def counts(self) -> sp.csr_matrix:
        """Counts, (n, g). Raises ValueError if the cells have none."""
        if not self.counted:
            raise ValueError("these cells hold log1p CP10k values of a gaussian head, and no counts")
        return self.values

    @property
    def log_values(self) -> sp.csr_matrix:
        """Values as log1p CP10k, (n, g) CSR float64."""
        return expression.log1p_cp10k(self.values) if self.counted else sp.csr_matrix(self.values, dtype=np.float64)

    def log_chunks(self) -> Iterator[sp.csr_matrix]:
        """Yield `log_values` in chunks of cells."""
        rows = expression.CHUNK if self.counted else expression.CHUNK // 8  # every gene of a cell is stored
        return (CellSet(part, {}, self.counted).log_values for part in expression.chunks(self.values, rows))

    def __getitem__(self, index: np.ndarray) -> CellSet:
        return CellSet(self.values[index], {k: v[index] for k, v in self.labels.items()}, self.counted)

    def crossed(self, labels: Sequence[str]) -> np.ndarray:
        """Return the class names of several labels joined, (n,).

        None for a cell that lacks one of the labels; "" if there are no labels.
        """
        if not labels:
            return np.full(self.n_cells, "", dtype=object)
        rows = zip(*(self.labels[name] for name in labels), strict=True)
        keys = [CLASSES.join(row) if all(isinstance(v, str) for v in row) else None for row in rows]
        return np.array(keys, dtype=object)


def joined(first: CellSet, second: CellSet) -> CellSet:
    """Return the cells of both sets, which have the same labels and hold the same kind of values."""
    if first.counted != second.counted:
        raise ValueError("one set of cells holds counts, the other log1p CP10k values")
    labels = {name: np.concatenate([values, second.labels[name]]) for name, values in first.labels.items()}
    return CellSet(sp.vstack([first.values, second.values], format="csr"), labels, first.counted)


def label_sets(labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the labels to compare within: every label and, if there are several, the combination of all."""
    single: dict[str, tuple[str, ...]] = {name: (name,) for name in labels}
    return single if len(labels) < 2 else single | {LABELS.join(labels): tuple(labels)}


def class_text(key: str | None) -> str:
    """Format a combined class for readers."""
    return "none" if key is None else key.replace(CLASSES, " + ")
