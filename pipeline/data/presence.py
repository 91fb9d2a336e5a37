"""Which genes a cell's data set measured: what was not measured is not zero.

Cells that measured the same genes form a group; a group has one row of bits, a cell the number of its group. So this
stays small (a Census of a thousand data sets and 60,000 genes: 8 MB) and travels as plain data; the mask of a batch is
made on the device.

Shape letters: n cells, p groups, g genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    pass

# A cell's group travels beside its labels, as one more code; no label has this name.
GROUP = "__measured__"


@dataclass(frozen=True)
class Presence:
    """Measured genes of each group, and the group of each cell."""

    names: tuple[str, ...]  # of the groups: data set, file or sample; several joined by " + "
    measured: np.ndarray  # (p, g) bool
    group: np.ndarray  # (n,) int32

    @classmethod
    def of_files(
        cls, names: Sequence[str], columns: Sequence[np.ndarray], n_cells: Sequence[int], n_genes: int
    ) -> Presence:
        """Each file measured the genes that it lists.

        Args:
            columns: For each file the places of its genes among all.
            n_cells: Cells of each file, which follow one another.
        """
        measured = np.zeros((len(names), n_genes), bool)
        for row, places in zip(measured, columns, strict=True):
            row[places] = True
        return cls(tuple(names), measured, np.repeat(np.arange(len(names), dtype=np.int32), n_cells))

    @classmethod
    def everywhere(cls, name: str, *, n_cells: int, n_genes: int) -> Presence:
        """One group that measured every gene."""
        return cls((name,), np.ones((1, n_genes), bool), np.zeros(n_cells, np.int32))

    def of_cells(self, index: np.ndarray) -> Presence:
        """The same for some of the cells."""
        return Presence(self.names, self.measured, self.group[index])

    def of_genes(self, places: np.ndarray) -> Presence:
        """The same for genes of a vocabulary; groups that then measured the same genes become one.

        Args:
            places: For each gene of the vocabulary its place in `measured`; -1 where the source lacks it: nobody
                measured it, (g,).
        """
        measured = self.measured[:, places] & (places >= 0)
        used, group = np.unique(self.group, return_inverse=True)
        rows, same = np.unique(np.packbits(measured[used], axis=1), axis=0, return_inverse=True)
        same = same.reshape(-1)
        first = [int(np.flatnonzero(same == k)[0]) for k in range(len(rows))]
        names = tuple(_joined([self.names[used[i]] for i in np.flatnonzero(same == k)]) for k in range(len(rows)))
        return Presence(names, measured[used][first], same[group].astype(np.int32))

    @property
    def is_whole(self) -> bool:
        """Whether every cell measured every gene."""
        return bool(self.measured.all())

    def cells_per_gene(self, of: np.ndarray | None = None) -> np.ndarray:
        """How many cells measured each gene, (g,).

        Args:
            of: Which cells count, bool (n,); all if None.
        """
        group = self.group if of is None else self.group[of]
        return np.bincount(group, minlength=len(self.names)) @ self.measured.astype(np.int64)

    def save(self, path: Path) -> None:
        """Names and bits; the groups of cells go into the table of cells."""
        bits = [row.tobytes() for row in np.packbits(self.measured, axis=1)]
        n_genes = np.full(len(bits), self.measured.shape[1], np.int32)
        frame = pd.DataFrame({"name": list(self.names), "n_measured": self.measured.sum(1), "bits": bits})
        frame.assign(n_genes=n_genes).to_parquet(path, index=False)


def read_measured(path: Path) -> np.ndarray:
    """Measured genes of each group, (p, g) bool."""
    frame = pd.read_parquet(path)
    bits = np.stack([np.frombuffer(b, np.uint8) for b in frame["bits"]])
    return np.unpackbits(bits, axis=1, count=int(frame["n_genes"].iloc[0])).astype(bool)


def _joined(names: Sequence[str]) -> str:
    return " + ".join(names[:3]) + (f" + {len(names) - 3} more" if len(names) > 3 else "")
