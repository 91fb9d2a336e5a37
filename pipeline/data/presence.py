"""Records which genes each cell's data set measured: a gene that was not measured is not zero.

Cells that measured the same genes form a group; a group has one row of bits, a cell the number of its group. So the
record is small (8 MB for a Census of a thousand data sets and 60,000 genes) and is sent as plain data; the mask of a
batch is built on the device.

Shape letters: n cells, p groups, g genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

# Name under which a cell's group is stored and sent with its label codes, as one more of them; no label is called this.
GROUP = "__measured__"


@dataclass(frozen=True)
class Presence:
    """Measured genes of each group, and the group of each cell."""

    names: tuple[str, ...]  # of the groups: data set, file or sample; merged ones joined by " + "
    measured: np.ndarray  # (p, g) bool
    group: np.ndarray  # (n,) int32

    @classmethod
    def from_files(
        cls, names: Sequence[str], columns: Sequence[np.ndarray], n_cells: Sequence[int], n_genes: int
    ) -> Presence:
        """Return the presence of files that each measured the genes that they list.

        Args:
            columns: For each file the positions of its genes among all.
            n_cells: Number of cells of each file; the files follow one another.
        """
        measured = np.zeros((len(names), n_genes), bool)
        for row, places in zip(measured, columns, strict=True):
            row[places] = True
        return cls(tuple(names), measured, np.repeat(np.arange(len(names), dtype=np.int32), n_cells))

    @classmethod
    def everywhere(cls, name: str, *, n_cells: int, n_genes: int) -> Presence:
        """Return a single group that measured every gene."""
        return cls((name,), np.ones((1, n_genes), bool), np.zeros(n_cells, np.int32))

    def of_cells(self, index: np.ndarray) -> Presence:
        """Select cells by index."""
        return Presence(self.names, self.measured, self.group[index])

    def of_genes(self, places: np.ndarray) -> Presence:
        """Select the genes of a vocabulary; groups that then measured the same genes are merged.

        Args:
            places: Position of each gene of the vocabulary in `measured`, (g,); -1 if the source lacks the gene, which
                then counts as not measured.
        """
        measured = self.measured[:, places] & (places >= 0)
        used, group = np.unique(self.group, return_inverse=True)
        rows, same = np.unique(np.packbits(measured[used], axis=1), axis=0, return_inverse=True)
        same = same.reshape(-1)
        first = [int(np.flatnonzero(same == k)[0]) for k in range(len(rows))]
        names = tuple(_joined([self.names[used[i]] for i in np.flatnonzero(same == k)]) for k in range(len(rows)))
        return Presence(names, measured[used][first], same[group].astype(np.int32))

    @property
    def is_complete(self) -> bool:
        """Whether every cell measured every gene."""
        return bool(self.measured.all())

    def cells_per_gene(self, of: np.ndarray | None = None) -> np.ndarray:
        """Return the number of cells that measured each gene, (g,).

        Args:
            of: Cells to count, bool (n,); all if None.
        """
        group = self.group if of is None else self.group[of]
        return np.bincount(group, minlength=len(self.names)) @ self.measured.astype(np.int64)

    def save(self, path: Path) -> None:
        """Write names and bits; the groups of cells are stored in the table of cells."""
        bits = [row.tobytes() for row in np.packbits(self.measured, axis=1)]
        n_genes = np.full(len(bits), self.measured.shape[1], np.int32)
        frame = pd.DataFrame({"name": list(self.names), "n_measured": self.measured.sum(1), "bits": bits})
        frame.assign(n_genes=n_genes).to_parquet(path, index=False)


def read_measured(path: Path) -> np.ndarray:
    """Read the measured genes of each group, (p, g) bool."""
    frame = pd.read_parquet(path)
    bits = np.stack([np.frombuffer(b, np.uint8) for b in frame["bits"]])
    return np.unpackbits(bits, axis=1, count=int(frame["n_genes"].iloc[0])).astype(bool)


def _joined(names: Sequence[str]) -> str:
    return " + ".join(names[:3]) + (f" + {len(names) - 3} more" if len(names) > 3 else "")
