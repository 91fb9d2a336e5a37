"""Cells as people have them, as a source of a job: a path stays one, cells in memory are written to a file once.

A file is named by a digest of what is in it, so that the same cells give the same stages, and a call that is repeated
goes on where it stopped.

Shape letters: b cells, n genes of the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pipeline.core.files import replaces
from scldm.data.cell_counts import RAW, CellsError, count_problem, layers_of, matrix_of, raw_cells
from scldm.errors import InputError

FIRST = ("counts", "raw_counts", "umi", "umis")  # layers that are tried before others if X holds no counts


@dataclass(frozen=True)
class Source:
    """Where a job reads cells."""

    address: str
    layer: str | None  # of the counts there
    notes: Sequence[str] = ()  # what was left out or chosen, in sentences


def source_of(cells: Any, folder: Path, *, layer: str | None) -> Source:
    """Return where a job reads cells.

    Args:
        cells: A path, an address, or an AnnData in memory, backed or a view.
        folder: Where cells in memory are written.
        layer: Of the counts of cells in memory; "raw": adata.raw. None: X, or else the first layer of counts.

    Raises:
        InputError: These are no cells, or they hold no counts.
    """
    if isinstance(cells, (str, Path)):
        return Source(str(cells), layer)
    if not isinstance(cells, anndata.AnnData):
        hint = "; of several files give a pattern, such as 'cells/*.h5ad'" if isinstance(cells, Sequence) else ""
        raise InputError(f"cells must be an AnnData, or the path or address of cells; got {type(cells).__name__}{hint}")
    if cells.isbacked and not cells.is_view:
        return Source(str(cells.filename), layer)
    counts, var, notes = _counts(cells, layer)
    obs, left_out = _writable(cells.obs)
    if left_out:
        notes.append(f"obs columns of mixed types are left out: {', '.join(left_out)}")
    file = folder / f"cells-{_digest(counts, obs, var)}.h5ad"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with replaces(file) as tmp:
            anndata.AnnData(counts, obs=obs, var=var).write_h5ad(tmp)
    return Source(str(file), None, notes)


def _counts(cells: anndata.AnnData, layer: str | None) -> tuple[sp.csr_matrix, pd.DataFrame, list[str]]:
    """Return counts (b, n) with their var, and what was chosen."""
    if layer == RAW and RAW not in cells.layers:
        raw = raw_cells(cells, argument="cells")
        return _checked(matrix_of(raw, None, argument="cells.raw"), cells, "raw"), raw.var, []
    if layer is not None:
        return _checked(matrix_of(cells, layer, argument="cells"), cells, f"layers[{layer!r}]"), cells.var, []
    problem = "X is empty"
    if cells.X is not None:
        x = matrix_of(cells, None, argument="cells")
        problem = count_problem(x, cells) or ""
        if not problem:
            return x, cells.var, []
    for name in sorted(map(str, cells.layers), key=lambda n: (FIRST.index(n) if n in FIRST else len(FIRST), n)):
        if count_problem(found := matrix_of(cells, name, argument="cells"), cells) is None:
            return found, cells.var, [f"counts are those of layers[{name!r}]: of X, {problem}"]
    if cells.raw is not None and count_problem(found := sp.csr_matrix(cells.raw.X), cells) is None:
        return found, cells.raw.var, [f"counts are those of raw: of X, {problem}"]
    raise CellsError(
        f"cells: of X, {problem}, and no layer holds counts (layers: {layers_of(cells)}; "
        f"{'no raw' if cells.raw is None else 'raw holds none either'}); train on cells with their raw counts"
    )


def _checked(values: sp.csr_matrix, cells: anndata.AnnData, place: str) -> sp.csr_matrix:
    if problem := count_problem(values, cells):
        raise CellsError(f"cells.{place}: {problem}; name the layer of raw counts ({layers_of(cells)})")
    return values


def _writable(obs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the columns that a file can hold, and the names of the others."""
    left_out = []
    for name in obs.columns:
        kind = pd.api.types.infer_dtype(obs[name], skipna=True)
        if obs[name].dtype == object and kind not in ("string", "boolean", "empty"):
            left_out.append(str(name))
    kept = obs.drop(columns=left_out).rename(columns=str)
    kept.index = kept.index.astype(str)
    return kept, left_out


def _digest(counts: sp.csr_matrix, obs: pd.DataFrame, var: pd.DataFrame) -> str:
    found = hashlib.sha256(repr(counts.shape).encode())
    for part in (counts.indptr, counts.indices, counts.data):
        found.update(np.ascontiguousarray(part).tobytes())
    for table in (obs, var):
        found.update(repr([*table.columns]).encode())
        found.update(table.to_csv().encode())
    return found.hexdigest()[:12]
