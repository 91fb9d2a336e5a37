"""Tables of vectors, one for each name: made features, and kept beside a model's vocabulary.

Features of a name are its vector, standardised per column over the names with training cells, in the coordinates of
their principal components: what lies outside the span of these vectors cannot be learned, and would only add noise for
a name that was never measured. How much of a vector that is, is kept, for the cosine between whole vectors.

Shape letters: n names, k of them with training cells, p width of the user's vectors, r of the features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from scldm.errors import CheckpointError

FILE = "label_vectors.safetensors"  # beside vocabulary.json
SMALLEST = 1e-6  # of a component's singular value, relative to the largest


@dataclass(frozen=True)
class NamedVectors:
    """The vectors of a user's table."""

    names: tuple[str, ...]
    values: np.ndarray  # (n, p) float64


@dataclass(frozen=True)
class VectorTable:
    """Features of all names of a table; read from its file when they are needed."""

    names: tuple[str, ...]
    width: int  # r
    digest: str  # of the features
    path: Path | None = field(default=None, compare=False)  # of the file that holds them
    label: str = ""
    held: tuple[np.ndarray, np.ndarray] | None = field(default=None, compare=False, repr=False)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Return the row of each name."""
        return {name: i for i, name in enumerate(self.names)}

    @property
    def values(self) -> np.ndarray:
        """Return the features, (n, r) float32."""
        return self._content[0]

    @property
    def outside(self) -> np.ndarray:
        """Return the share of each vector's squared length that is outside the span of the measured ones, (n,)."""
        return self._content[1]

    @cached_property
    def _content(self) -> tuple[np.ndarray, np.ndarray]:
        if self.held is not None:
            return self.held
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            assert self.path is not None
            stored = load_file(self.path)
            content = stored[f"vectors:{self.label}"], stored[f"outside:{self.label}"]
        except (OSError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path} is missing or damaged: it holds the vectors of the label {self.label!r}; copy the whole "
                "folder again"
            ) from error
        if _digest(*content) != self.digest:
            raise CheckpointError(
                f"{self.path} does not hold the vectors of the label {self.label!r} that its vocabulary.json names; "
                "copy the whole folder again"
            )
        return content


def _digest(values: np.ndarray, outside: np.ndarray) -> str:
    whole = hashlib.sha256(np.ascontiguousarray(values, np.float32).tobytes())
    whole.update(np.ascontiguousarray(outside, np.float32).tobytes())
    return whole.hexdigest()


def fit_vectors(label: str, given: NamedVectors, measured: Sequence[str]) -> VectorTable:
    """Return the features of all names.

    A column that does not differ between measured names is left out. The squares of the features of measured names are
    1 on average.

    Args:
        measured: Names with training cells, which the table has.

    Raises:
        ValueError: The measured vectors do not differ.
    """
    at = {name: i for i, name in enumerate(given.names)}
    known = given.values[[at[name] for name in measured]]  # (k, p)
    mean, sd = known.mean(0), known.std(0)
    differs = sd > 1e-12 * np.maximum(np.abs(mean), 1e-300)
    if len(measured) < 2 or not differs.any():
        raise ValueError(f"the vectors of the {len(measured)} names with training cells do not differ")
    x = (given.values[:, differs] - mean[differs]) / sd[differs]
    _, s, directions = np.linalg.svd(x[[at[name] for name in measured]], full_matrices=False)
    directions = directions[s > SMALLEST * s[0]]  # (r, p)
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], axis=1)
    inside = x @ (directions * np.sign(largest)).T  # (n, r)
    total = (x**2).sum(1)
    outside = 1 - (inside**2).sum(1) / np.where(total > 0, total, 1)
    outside[total == 0] = 0
    values = (inside * np.sqrt(len(directions) / x.shape[1])).astype(np.float32)
    content = values, np.clip(outside, 0, 1).astype(np.float32)
    return VectorTable(given.names, len(directions), _digest(*content), label=label, held=content)


def nearest_row(table: VectorTable, name: str, among: Sequence[str]) -> tuple[str, float]:
    """Return the name whose vector has the largest cosine with that of `name`, and the cosine.

    Args:
        among: Names with training cells, whose vectors lie in the span of the features.
    """
    row, others = table.rows[name], [table.rows[x] for x in among]
    x, y = table.values[row].astype(np.float64), table.values[others].astype(np.float64)
    whole = np.linalg.norm(x) / np.sqrt(max(1 - float(table.outside[row]), 1e-12))
    cosines = y @ x / np.maximum(np.linalg.norm(y, axis=1) * whole, 1e-12)
    best = int(cosines.argmax())
    return among[best], float(cosines[best])


def save_tables(folder: Path, tables: Mapping[str, VectorTable]) -> None:
    """Write the features of labels into a folder; no file if there are none."""
    if not tables:
        return
    from safetensors.numpy import save

    parts = {f"vectors:{label}": np.ascontiguousarray(t.values) for label, t in tables.items()}
    parts |= {f"outside:{label}": t.outside for label, t in tables.items()}
    (folder / FILE).write_bytes(save(parts))  # with the permissions of the files beside it
