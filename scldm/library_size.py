"""Library sizes (sum of counts of a cell) per condition: log-normal statistics and draws.

The statistic of a condition is the mean and standard deviation of log(library size). A condition with fewer than
`MIN_CELLS` training cells falls back, in this stated order: the exact combination of labels, each single label on its
own (the one with most cells), all cells. `level` says which one was used, so that nothing is hidden.

Statistics taken over from elsewhere may not say how many cells they rest on (n_cells None); they count as enough. A
model may also have none at all: then `missing` says why, and asking for one is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MIN_CELLS = 5
ALL = "all"


@dataclass(frozen=True)
class LogNormal:
    mean: float  # of log(library size)
    sd: float
    n_cells: int | None  # None: not known
    level: str = ALL  # "cell_type=B|donor=3", "cell_type=B" or "all"


def condition_key(condition: Mapping[str, str | None]) -> str:
    """Canonical name of a (partial) condition: labels sorted, absent ones left out."""
    given = sorted((k, v) for k, v in condition.items() if v is not None)
    return "|".join(f"{k}={v}" for k, v in given) or ALL


@dataclass(frozen=True)
class LibrarySizes:
    """Statistics by condition key; holds "all", or says in `missing` why there are none."""

    table: Mapping[str, LogNormal]
    missing: str | None = None

    def __post_init__(self) -> None:
        if self.missing is not None and self.table:
            raise ValueError(f"library-size statistics cannot be missing ({self.missing}) and given")
        if self.missing is None and ALL not in self.table:
            raise ValueError('library-size statistics must hold the entry "all"')

    @classmethod
    def fit(cls, library_size: np.ndarray, labels: Mapping[str, np.ndarray]) -> LibrarySizes:
        """Statistics of all cells, of each class of each label, and of each combination of labels seen.

        Args:
            library_size: Sum of counts per training cell, > 0, (n,).
            labels: Class names per label, each (n,).
        """
        size = np.asarray(library_size, dtype=np.float64)
        if not len(size):
            raise ValueError("no cells to take library-size statistics from")
        if (size <= 0).any():
            raise ValueError(f"library sizes must be > 0; {int((size <= 0).sum())} cells have none")
        log_size = np.log(size)
        table = {ALL: _log_normal(log_size, ALL)}
        for name, values in labels.items():
            for value in np.unique(values):
                key = condition_key({name: str(value)})
                table[key] = _log_normal(log_size[values == value], key)
        if len(labels) > 1:
            names = sorted(labels)
            joint = np.array(["|".join(f"{n}={labels[n][i]}" for n in names) for i in range(len(size))])
            for key in np.unique(joint):
                table[str(key)] = _log_normal(log_size[joint == key], str(key))
        return cls(table)

    def of(self, condition: Mapping[str, str | None]) -> LogNormal:
        """Statistic for a condition, by the fall-back chain of this module."""
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
        if self.missing is not None:
            return json.dumps({"missing": self.missing})
        return json.dumps({k: [s.mean, s.sd, s.n_cells] for k, s in self.table.items()})

    @classmethod
    def from_json(cls, text: str) -> LibrarySizes:
        table = json.loads(text)
        if isinstance(table.get("missing"), str):
            return cls({}, table["missing"])
        return cls({k: LogNormal(m, s, None if n is None else int(n), k) for k, (m, s, n) in table.items()})

    def save(self, path: Path) -> None:
        path.write_text(self.to_json())

    @classmethod
    def load(cls, path: Path) -> LibrarySizes:
        return cls.from_json(path.read_text())


def _log_normal(log_size: np.ndarray, level: str) -> LogNormal:
    return LogNormal(float(log_size.mean()), float(log_size.std()), len(log_size), level)
