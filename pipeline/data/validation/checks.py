"""Checks that a source holds raw counts with the requested labels, and reports all problems together.

A source of cells is a `CellTables`: obs, var and a stream of CSR chunks. Tables are checked whole; counts are checked
chunk by chunk while they are written, so that a large file is read once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pipeline.config.ingest import MISSING_TEXT
from pipeline.data.safety.h5ad_parts import UNREADABLE
from pipeline.data.tables import CellTables
from pipeline.data.validation.counts import (
    TOO_LARGE,
    fractions_are,
    remedy_of,
    same_total_findings,
    value_faults,
    value_text,
)
from pipeline.data.validation.gene_names import GeneNames, gene_findings
from pipeline.data.validation.names import MIN_CELLS, label_findings
from scldm.errors import InputError


def label_problems(
    obs: pd.DataFrame, labels: Sequence[str], *, drop_missing: bool, names: pd.Series | None,
    missing_text: Sequence[str] = MISSING_TEXT, named_by: Mapping[str, str] = {}, values: Collection[str] = (),
) -> list[str]:  # fmt: skip
    """Return problems with the label columns of obs.

    Args:
        drop_missing: Whether cells without a label are left out later, and so are no problem.
        names: Names of the cells for examples; None uses the index of obs.
        missing_text: As `ingest.missing_text`.
        named_by: Place that names a column which is no label, for messages.
        values: Labels whose classes are values, see `label_findings`.
    """
    names = names if names is not None else pd.Series(obs.index)
    found = label_findings(
        obs, labels, names, missing_text=missing_text, drop_missing=drop_missing, named_by=named_by, values=values
    )
    return [f.message for f in found if f.level == "error"]


def table_problems(
    tables: CellTables, labels: Sequence[str], *, drop_missing: bool, min_cells: int = MIN_CELLS,
    missing_text: Sequence[str] = MISSING_TEXT, values: Collection[str] = (),
) -> list[str]:  # fmt: skip
    """Return problems with obs and var, before any count is read; notes are added to `tables`."""
    obs, ids = tables.obs, tables.var["feature_id"]
    problems = []
    if len(obs) < min_cells:
        problems.append(f"{len(obs)} cells are too few to split, train and score; at least {min_cells} are needed")
    names = obs.get("obs_id")
    problems += label_problems(
        obs, labels, drop_missing=drop_missing, names=names, missing_text=missing_text, values=values
    )
    if any(label not in obs for label in labels):
        problems += [note.removesuffix(".") for note in tables.notes if UNREADABLE in note]
    of_genes = gene_findings(GeneNames(list(ids))) if tables.of_genes is None else tables.of_genes
    problems += [f.message for f in of_genes if f.level == "error"]
    if names is not None and (n := int(names[names.duplicated()].nunique())):
        tables.notes.append(f"{n} obs names occur more than once; cells are told apart by soma_joinid.")
    return problems


def count_problems(chunk: sp.csr_matrix, *, first_cell: int, tables: CellTables) -> list[str]:
    """Return reasons why a chunk does not hold raw counts, with an example of each."""
    problems = []
    for what, bad in value_faults(chunk.data):
        if bad.any():
            k = int(np.argmax(bad))
            cell = first_cell + int(np.searchsorted(chunk.indptr, k, side="right")) - 1
            name = tables.obs["obs_id"].iloc[cell] if "obs_id" in tables.obs else cell
            gene = tables.var["feature_id"].iloc[chunk.indices[k]]
            problems.append(
                f"{int(bad.sum())} values of {chunk.shape[0]} cells {what} (first: cell {name}, gene {gene}, value "
                f"{value_text(chunk.data[k])})"
            )
    return problems


def checked(
    tables: CellTables, labels: Sequence[str], *, drop_missing: bool = False, min_cells: int = MIN_CELLS,
    missing_text: Sequence[str] = MISSING_TEXT, values: Collection[str] = (),
) -> Iterator[sp.csr_matrix]:  # fmt: skip
    """Yield the chunks of a source, each checked.

    Raises:
        InputError: a chunk does not hold counts, or (before any chunk) the tables have problems; with all problems
            found so far.
    """
    problems = table_problems(
        tables, labels, drop_missing=drop_missing, min_cells=min_cells, missing_text=missing_text, values=values
    )
    if problems and not (len(tables.obs) and len(tables.var)):
        raise not_usable(tables, problems)  # without cells or genes there are no chunks to check
    return _checked(tables, problems)


def _checked(tables: CellTables, problems: list[str]) -> Iterator[sp.csr_matrix]:
    n_cells = empty = 0
    totals: list[np.ndarray] = []
    for chunk in tables.chunks():
        chunk = sp.csr_matrix(chunk)
        bad = count_problems(chunk, first_cell=n_cells, tables=tables)
        if bad or problems:
            raise not_usable(tables, problems + bad + (_remedy(tables, chunk) if bad else []))
        n_cells += chunk.shape[0]
        totals.append(np.asarray(chunk.sum(1)).ravel())
        empty += int((totals[-1] == 0).sum())
        yield chunk
    if problems:
        raise not_usable(tables, problems)
    if empty == n_cells:
        raise not_usable(tables, ["no cell has a count"])
    if empty:
        tables.notes.append(f"{empty} of {n_cells} cells have no counts and are left out.")
    tables.notes += [found.message for found in same_total_findings(np.concatenate(totals))]


def not_usable(tables: CellTables, problems: Sequence[str]) -> InputError:
    """Return an error that lists all problems of a source."""
    return InputError("\n".join([f"{tables.where} cannot be used:", *(f"  - {p}" for p in problems)]))


def _remedy(tables: CellTables, chunk: sp.csr_matrix) -> list[str]:
    """Return where the counts may be instead, or how the values become counts."""
    places = tables.other_counts()
    if places:
        return [f"raw counts are needed; this file has some elsewhere: set ingest.source.{' or '.join(places)}"]
    needed = "raw counts are needed, not normalised, log-transformed or scaled values; this file holds no other counts"
    values, totals = chunk.data, np.asarray(chunk.sum(1)).ravel()
    if {what for what, bad in value_faults(values) if bad.any()} == {TOO_LARGE}:
        return [remedy_of(TOO_LARGE, "")]
    if not np.isfinite(values).all() or (values < 0).any() or (values == np.rint(values)).all():
        return [needed]
    return [f"{needed}; these look like {fractions_are(values, float(values.max()), totals)}"]
