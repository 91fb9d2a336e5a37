"""A request for cells: a table of conditions with a number of cells each.

Cell ids count over the whole request, row after row. Here it is in names, without torch; `recipe` turns it into
numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RequestRow:
    """One row of a request: a condition and a number of cells."""

    condition: Mapping[str, str | None]  # label -> class; None or absent: generated without the label
    n_cells: int
    guidance: Mapping[str, float] = field(
        default_factory=dict
    )  # label, "" for all, "*" for all together -> scale, if set
    library_size: float | None = None  # of all cells of the row; None: from the settings


@dataclass(frozen=True)
class Request:
    """A table of conditions with numbers of cells."""

    rows: tuple[RequestRow, ...]

    @property
    def n_cells(self) -> int:
        """Number of cells of all rows."""
        return sum(r.n_cells for r in self.rows)

    @property
    def digest(self) -> str:
        """Hash of the request."""
        return hashlib.sha256(json.dumps(self.as_plain()).encode()).hexdigest()

    def as_plain(self) -> list[list[Any]]:
        """Return the request as plain data, for JSON and for actors."""
        return [[dict(r.condition), r.n_cells, dict(r.guidance), r.library_size] for r in self.rows]

    @classmethod
    def from_plain(cls, rows: list[list[Any]]) -> Request:
        """Build a request from the data of `as_plain`."""
        return cls(tuple(RequestRow(*row) for row in rows))

    def slice(self, start: int, stop: int) -> list[tuple[dict[str, str | None], int]]:
        """Return (condition, number of cells) for ids [start, stop), in order."""
        out, first = [], 0
        for row in self.rows:
            n = min(stop, first + row.n_cells) - max(start, first)
            if n > 0:
                out.append((dict(row.condition), n))
            first += row.n_cells
        return out


@dataclass(frozen=True)
class Settings:
    """Defaults for rows that set nothing else."""

    guidance: Mapping[str, float] | float = 1.0
    library_size: float | str = "statistics"  # a string: from the training cells' statistics
