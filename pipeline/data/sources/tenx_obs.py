"""Joins the table of a user (`ingest.source.obs`) to the cells of Cell Ranger outputs, by sample and barcode.

Every error is about the table, so it names the table's columns and rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.config.job import TenxSource
from scldm.data.class_names import class_names
from scldm.data.user_table import JOINED, TableError, read_table, with_numbers
from scldm.text import choices_hint, shown

BARCODE, SAMPLE = "barcode", "sample"
SHOWN = 6  # names of samples in a message


def describe(obs: pd.DataFrame, source: TenxSource, samples: Sequence[str], notes: list[str]) -> pd.DataFrame:
    """Return the cells with the columns of the table.

    Args:
        obs: Cells: obs_id, barcode, dataset_id (the name of the sample).
        notes: A line is added for what readers of the results should know.

    Raises:
        TableError: The table lacks a column, describes a cell twice, or describes no cell.
    """
    assert source.obs is not None
    where = f"ingest.source.obs: {source.obs}"
    table = read_table(Path(source.obs), "ingest.source.obs", first=BARCODE)
    if joined := table.attrs[JOINED]:
        names = ", ".join(repr(shown(x)) for x in joined[:SHOWN])
        notes.append(f"{source.obs}: white space around fields is left out, so spellings are joined of {names}.")
    table = _renamed(table, source)
    keys = [SAMPLE, BARCODE] if len(samples) > 1 else [BARCODE]
    if problems := [_absent(k, table, obs, samples, where) for k in keys if k not in table]:
        raise TableError("\n".join(problems))
    table = with_numbers(table.drop(columns=keys)).assign(**{k: class_names(table[k]) for k in keys})
    _require_once(table, keys, str(source.obs))
    if len(samples) > 1:
        obs = obs.assign(sample=obs["dataset_id"])
    table = table.drop(columns="obs_id", errors="ignore")
    # The table's own dataset_id takes precedence.
    own = obs.drop(columns=["dataset_id"] if "dataset_id" in table else [])
    cells = own.merge(table, on=keys, how="left", indicator="_found", validate="m:1")
    found = int((cells.pop("_found") == "both").sum())
    if not found:
        raise TableError(_about_no_cell(table, own, keys, source, samples))
    unused = len(table) - found
    notes.append(f"{found} of {len(obs)} cells are described by {source.obs}; {unused} of its rows are of no cell.")
    return cells


def _renamed(table: pd.DataFrame, source: TenxSource) -> pd.DataFrame:
    """Return the table with the names of `ingest.source.columns`."""
    for new, old in source.columns.items():
        if old not in table:
            hint = choices_hint(old, table.columns)
            raise TableError(f"ingest.source.columns: {source.obs} has no column {old!r} ({hint}); name one of them")
        table = table.drop(columns=[new] if new != old and new in table else []).rename(columns={old: new})
    return table


def _absent(key: str, table: pd.DataFrame, obs: pd.DataFrame, samples: Sequence[str], where: str) -> str:
    """Describe a column that is not there, and which column holds its values."""
    what = f"{where} has no column {key} ({choices_hint(key, table.columns)})"
    if key == SAMPLE:
        more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
        what += f", and there are {len(samples)} samples: {', '.join(samples[:SHOWN])}{more}"
    if (column := _column_of(table, obs["dataset_id" if key == SAMPLE else BARCODE])) is not None:
        return f"{what}; {column} holds such values: set ingest.source.columns: {{{key}: {column}}}"
    holds = "the name of each cell's sample" if key == SAMPLE else f"barcodes as {obs[BARCODE].iloc[0]}"
    return f"{what}; add a column {key} that holds {holds}"


def _column_of(table: pd.DataFrame, values: pd.Series) -> str | None:
    """Return the column whose values are mostly among those of the cells."""
    known = set(values)
    shares = {str(c): float(pd.Series(class_names(table[c]), dtype=object).isin(known).mean()) for c in table}
    best = max(shares, key=lambda c: shares[c], default=None)
    return best if best is not None and shares[best] > 0.5 else None


def _require_once(table: pd.DataFrame, keys: list[str], path: str) -> None:
    """Raise TableError if two rows are about the same cell."""
    again = table.duplicated(keys, keep=False).to_numpy()
    if not again.any():
        return
    first = table[keys].iloc[int(np.argmax(again))]
    rows = np.flatnonzero((table[keys] == first).all(axis=1).to_numpy())
    differ = [str(c) for c in table if c not in keys and table[c].iloc[rows].nunique(dropna=False) > 1]
    name = ", ".join(f"{k} {first[k]}" for k in keys)
    places = ", ".join(str(i + 1) for i in rows[:SHOWN])
    n = int(table.duplicated(keys).sum())
    raise TableError(
        f"ingest.source.obs: {n} rows of {path} have the {' and '.join(keys)} of another row (first: {name} in rows "
        + places
        + (f", which differ in {', '.join(differ[:3])}" if differ else "")
        + "); keep one row for each cell"
        + ("" if len(keys) > 1 or SAMPLE not in table else ", of the sample that is read")
    )


def _about_no_cell(
    table: pd.DataFrame, own: pd.DataFrame, keys: list[str], source: TenxSource, samples: Sequence[str]
) -> str:
    cell, row = dict(own[keys].iloc[0]), dict(table[keys].iloc[0]) if len(table) else "nothing"
    what = f"ingest.source.obs: no row of {source.obs} is about a cell of {source.path}; cells are like {cell}, "
    what += f"rows like {row}"
    if SAMPLE in keys and not set(table[SAMPLE]) & set(samples):
        return f"{what}; in the column sample write {', '.join(samples[:SHOWN])}"
    others = table.drop(columns=keys)
    if (column := _column_of(others, own[BARCODE])) is not None:
        return f"{what}; {column} holds such barcodes: set ingest.source.columns: {{{BARCODE}: {column}}}"
    return f"{what}; write the barcodes of the table as in the output"
