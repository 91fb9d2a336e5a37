"""Library sizes (sum of counts of a cell) per condition: log-normal statistics and draws.

The statistic of a condition is the mean and standard deviation of log(library size). A condition with fewer than
`MIN_CELLS` training cells falls back in this order: the exact combination of labels, the single label with the most
cells, all cells. `level` records which one was used.

Statistics from an imported model may lack the number of cells behind them (n_cells None); they count as enough. A model
may also have none at all: then `missing` gives the reason, and looking one up is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MIN_CELLS = 5
ALL = "all"


@dataclass(frozen=True)
class LogNormal:
    """Log-normal statistics of the library sizes of one condition."""

    mean: float  # of log(library size)
    sd: float
    n_cells: int | None  # None: not known
    level: str = ALL  # "cell_type=B|donor=3", "cell_type=B" or "all"


def condition_key(condition: Mapping[str, str | None]) -> str:
    """Return the canonical name of a (partial) condition: labels sorted, absent ones left out."""
    given = sorted((k, v) for k, v in condition.items() if v is not None)
    return "|".join(f"{k}={v}" for k, v in given) or ALL


@dataclass(frozen=True)
class LibrarySizes:
    """Library-size statistics by condition key. Holds "all", or the reason in `missing` if there are none."""

    table: Mapping[str, LogNormal]
    missing: str | None = None

    def __post_init__(self) -> None:
        if self.missing is not None and self.table:
            raise ValueError(f"library-size statistics cannot be missing ({self.missing}) and given")
        if self.missing is None and ALL not in self.table:
            raise ValueError('library-size statistics must hold the entry "all"')

    @classmethod
    def fit(cls, library_size: np.ndarray, labels: Mapping[str, np.ndarray]) -> LibrarySizes:
        """Compute statistics of all cells, of each class of each label, and of each observed combination of labels.

        Args:
            library_size: Sum of counts per training cell, > 0, (n,).
            labels: Class names per label, each (n,).
        """
        coded = {}
        for name, values in labels.items():
            classes, codes = np.unique(np.asarray(values).astype(str), return_inverse=True)
            coded[name] = (classes.tolist(), codes)
        return cls.fit_codes(library_size, coded)

    @classmethod
    def fit_codes(
        cls, library_size: np.ndarray, labels: Mapping[str, tuple[Sequence[str], np.ndarray]]
    ) -> LibrarySizes:
        """Compute the same from class ids, in a few passes over the cells whatever the number of classes.

        Args:
            library_size: Sum of counts per training cell, > 0, (n,).
            labels: For each label its class names, and the class id of each cell, (n,).
        """
        size = np.asarray(library_size, dtype=np.float64)
        if not len(size):
            raise ValueError("no cells to take library-size statistics from")
        if (size <= 0).any():
            raise ValueError(f"library sizes must be > 0; {int((size <= 0).sum())} cells have none")
        log_size = np.log(size)
        table = {ALL: _log_normal(log_size, ALL)}
        for name, (classes, codes) in labels.items():
            table |= _by_group(log_size, codes, [condition_key({name: str(c)}) for c in classes])
        if len(labels) > 1:
            combinations, joint = _combinations({name: codes for name, (_, codes) in labels.items()})
            keys = [condition_key({n: str(labels[n][0][c]) for n, c in x.items()}) for x in combinations]
            table |= _by_group(log_size, joint, keys)
        return cls(table)

    def of(self, condition: Mapping[str, str | None]) -> LogNormal:
        """Return the statistics for a condition, by the fallback order of this module.

        Raises:
            ValueError: The model has no library-size statistics.
        """
        if self.missing is not None:
            raise ValueError(f"this model has no library-size statistics: {self.missing}")
        singles = [{k: v} for k, v in condition.items() if v is not None]
        single_keys = sorted((condition_key(c) for c in singles), key=lambda k: -self._n(k))
        for key in (condition_key(condition), *single_keys):
            if self._n(key) >= MIN_CELLS:
                return self.table[key]
        return self.table[ALL]

    def _n(self, key: str) -> int:
        if key not in self.table:
            return 0
        n = self.table[key].n_cells
        return MIN_CELLS if n is None else n

    def to_json(self) -> str:
        """Serialize the statistics, as in `library_size.json`."""
        if self.missing is not None:
            return json.dumps({"missing": self.missing})
        return json.dumps({k: [s.mean, s.sd, s.n_cells] for k, s in self.table.items()})

    @classmethod
    def from_json(cls, text: str) -> LibrarySizes:
        """Parse the text that `to_json` returns."""
        table = json.loads(text)
        if isinstance(table.get("missing"), str):
            return cls({}, table["missing"])
        return cls({k: LogNormal(m, s, None if n is None else int(n), k) for k, (m, s, n) in table.items()})

    def save(self, path: Path) -> None:
        """Write the statistics to a JSON file."""
        path.write_text(self.to_json())

    @classmethod
    def load(cls, path: Path) -> LibrarySizes:
        """Read the statistics from a JSON file."""
        return cls.from_json(path.read_text())


def _log_normal(log_size: np.ndarray, level: str) -> LogNormal:
    return LogNormal(float(log_size.mean()), float(log_size.std()), len(log_size), level)


def _by_group(log_size: np.ndarray, group: np.ndarray, keys: Sequence[str]) -> dict[str, LogNormal]:
    """Return the statistics of each group that has cells, under its key."""
    n = np.bincount(group, minlength=len(keys))
    mean = np.bincount(group, log_size, minlength=len(keys)) / np.maximum(n, 1)
    square = np.bincount(group, (log_size - mean[group]) ** 2, minlength=len(keys))
    sd = np.sqrt(square / np.maximum(n, 1))
    return {k: LogNormal(float(mean[i]), float(sd[i]), int(n[i]), k) for i, k in enumerate(keys) if n[i]}


def _combinations(codes: Mapping[str, np.ndarray]) -> tuple[list[dict[str, int]], np.ndarray]:
    """Return the combinations of class ids that occur, and the index of each cell's combination."""
    joint, seen = np.zeros(len(next(iter(codes.values()))), np.int64), np.zeros((1, 0), np.int64)
    for column in codes.values():
        width = int(column.max(initial=0)) + 1
        found, joint = np.unique(joint * width + column, return_inverse=True)
        seen = np.column_stack([seen[found // width], found % width])
    return [dict(zip(codes, row, strict=True)) for row in seen.tolist()], joint
