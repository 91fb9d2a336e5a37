"""Reads tables of vectors that users bring: one vector for each name (ESM, GenePT, Morgan fingerprints, any other)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from scldm.data.class_names import class_names
from scldm.data.labels.vectors import NamedVectors
from scldm.data.user_table import read_table
from scldm.errors import InputError

SHOWN = 5


def read_named_vectors(
    path: Path, setting: str, *, column: str, ids: str = "names", things: str = "names"
) -> NamedVectors:
    """Read a table: names in the column `column`, in the first column or in the index; all others are numbers.

    One column of lists of numbers, as Parquet holds them, is a vector too.

    Args:
        setting: Setting that names the file, for messages.
        column: Name of the column of names.
        ids: What the names are called in messages.
        things: What has a name.

    Raises:
        InputError: It is no such table; all that is wrong with it is said.
    """
    table = read_table(path, setting, first=column)
    if column not in table and len(table.columns) and pd.to_numeric(_texts(table), errors="coerce").isna().any():
        table = table.rename(columns={table.columns[0]: column})  # a column of numbers alone is no column of names
    if column not in table:
        raise InputError(f"{setting}: {path} has no {ids}: name their column {column}, or make it the first one")
    names, problems = pd.Series(class_names(table[column]), dtype=object), []
    if (absent := np.flatnonzero(names.isna())).size:
        problems.append(f"{len(absent)} rows have no name, the first is row {absent[0] + 1}")
    names = names.astype(str)
    if twice := names[names.duplicated()].unique().tolist():
        problems.append(f"{len(twice)} {things} have several rows ({', '.join(twice[:SHOWN])})")
    numbers = _numbers(table.drop(columns=column), names, ids, problems)
    if problems:
        raise InputError(f"{setting}: {path}: " + "; ".join(problems))
    return NamedVectors(tuple(names), numbers)


def _texts(table: pd.DataFrame) -> pd.Series:
    return table.iloc[:, 0].astype(str)


def _numbers(table: pd.DataFrame, names: pd.Series, ids: str, problems: list[str]) -> np.ndarray:
    """Return the vectors, (n, p); whatever is no finite number is a problem."""
    if not len(table.columns):
        problems.append(f"it has no column of numbers beside the {ids}")
        return np.zeros((len(table), 0))
    if len(table.columns) == 1 and table.iloc[:, 0].map(lambda x: isinstance(x, (list, tuple, np.ndarray))).all():
        rows = [np.asarray(x, dtype=np.float64).ravel() for x in table.iloc[:, 0]]
        width = max(set(map(len, rows)), key=[len(r) for r in rows].count) if rows else 0
        if other := [(name, len(r)) for name, r in zip(names, rows, strict=True) if len(r) != width]:
            first = ", ".join(f"{name}: {n}" for name, n in other[:SHOWN])
            problems.append(f"{len(other)} vectors have another width than {width} ({first})")
            return np.zeros((len(table), 0))
        table = pd.DataFrame(np.stack(rows), columns=[str(i) for i in range(width)])
    numbers = table.apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    if (bad := ~np.isfinite(numbers)).any():
        row, column = np.argwhere(bad)[0]
        problems.append(
            f"{int(bad.sum())} fields are no finite numbers, the first is column {table.columns[column]} of "
            f"{names.iloc[row]}"
        )
    return numbers
