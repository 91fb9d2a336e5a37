"""What an `.h5ad` file holds and what is wrong with it; each part is looked at even if another is broken."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from pipeline.data.findings import Examined, Finding, error, shown
from pipeline.data.inspection.columns import obs_profile, var_profile
from pipeline.data.safety.count_matrix import CountMatrix, find_matrix, layout_problems, pieces
from pipeline.data.safety.hdf5 import open_problems, unsafe
from pipeline.data.validation.counts import CountAudit, value_faults
from pipeline.data.validation.names import (
    cell_findings,
    class_counts,
    ensembl_columns,
    gene_findings,
    label_findings,
    suggested_labels,
)

_AGAIN = "save it again from a sound copy"
DAMAGE = (OSError, KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, UnicodeError,
          NotImplementedError, OverflowError, MemoryError)  # fmt: skip
"""What reading a damaged file raises in h5py, anndata, pandas and numpy."""


def structure_problems(path: Path, layer: str | None = None) -> list[Finding]:
    """What must hold before a reader may open the file: it is safe, and shapes, pointers and lengths agree."""
    if found := open_problems(path):
        return found
    try:
        return _structure_problems(path, layer)
    except DAMAGE as problem:
        return [_damaged(problem)]


def _structure_problems(path: Path, layer: str | None) -> list[Finding]:
    with h5py.File(path) as file:
        found = [f for f in unsafe(file) if f.level == "error"]
        if found:
            return found
        if absent := [k for k in ("obs", "var") if k not in file]:
            holds = ", ".join(sorted(map(shown, file))[:6]) or "nothing"
            return [error(f"the file is HDF5 but not .h5ad: it has no {' and no '.join(absent)} (it holds {holds})",
                          "a Cell Ranger file is read with ingest.source: {type: 10x, …}")]  # fmt: skip
        place, frames = _matrix_place(file, layer), ("obs", _var_place(file, layer))
        problems = [f for name in frames if name in file for f in _frame_problems(file[name], name)]
        matrix = find_matrix(file[place], place) if place in file else None
        if matrix is None or isinstance(matrix, Finding):
            return problems if matrix is None else [*problems, matrix]
        if not problems:  # anndata itself opens a file whose tables are shorter than its matrix
            problems = _length_problems(file, frames, matrix, place)
        return [*problems, *layout_problems(matrix, place)]


def examine_h5ad(
    path: Path, *, labels: Sequence[str], layer: str | None, gene_id: str | None, counts: bool, profile: bool = False
) -> Examined:
    """Everything about one file.

    Args:
        labels: obs columns that must be usable labels.
        layer: As `ingest.source.layer`.
        gene_id: As `ingest.source.gene_id`.
        counts: Read the values too.
        profile: Say what every column is like, and where else whole numbers are.
    """
    found = Examined(str(path), "h5ad")
    found.findings += open_problems(path)
    if found.errors:
        return found
    try:
        _look_inside(found, path, labels=labels, layer=layer, gene_id=gene_id, counts=counts, profile=profile)
    except DAMAGE as problem:
        if not found.errors:  # else it follows from what is reported
            found.findings.append(_damaged(problem))
    return found


def _look_inside(
    found: Examined, path: Path, *, labels: Sequence[str], layer: str | None, gene_id: str | None, counts: bool,
    profile: bool,
) -> None:  # fmt: skip
    with h5py.File(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.findings += unsafe(file)
        if found.errors:
            return
        unsound = structure_problems(path, layer)
        found.findings += unsound
        if not {"obs", "var"} <= set(file):
            return
        obs, var = _frame(file, "obs", found), _frame(file, _var_place(file, layer), found)
        _names(found, obs, var, labels, gene_id)
        place = _matrix_place(file, layer)
        places = [p for p in _places(file) if p != f"layer: {layer or 'null'}"]
        if profile:
            found.facts["profile"] = {"obs": {} if obs is None else obs_profile(obs), "places": _places(file)}
            found.facts["profile"] |= {} if var is None else {"var": var_profile(var)}
        if place not in file:
            found.findings.append(error(f"the file has no {shown(place)}", _elsewhere(places)))
            return
        matrix = find_matrix(file[place], place)
        if isinstance(matrix, Finding):
            return  # reported with the structure
        found.facts["matrix"] = f"{place}, {matrix.kind}, {matrix.shape[0]:,} x {matrix.shape[1]:,}"
        if counts and not unsound:
            _counts(found, matrix, place, obs, var, places)


def _damaged(problem: BaseException) -> Finding:
    lines = str(problem).splitlines() or ["no message"]
    return error(f"the file is damaged: {shown(lines[0][:200])} ({type(problem).__name__})", _AGAIN)


# ---- obs and var -------------------------------------------------------------------------------------------------
def _frame_problems(node: Any, name: str) -> list[Finding]:
    """Columns that are missing or of unequal lengths; the reader would say so less plainly."""
    if isinstance(node, h5py.Dataset):  # anndata before 0.7
        if node.dtype.names and node.ndim == 1:
            return []
        return [error(f"{name} is an array of {node.dtype}", f"it must be a table; {_AGAIN}")]
    index = _index_of(node)
    if not isinstance(index, str) or not isinstance(node.get(index), h5py.Dataset) or node[index].ndim != 1:
        return [error(f"{name} has no index of names (_index is {shown(index)!r})", _AGAIN)]
    n, wrong = len(node[index]), []
    for key in node:
        column = node[key]
        values = column if isinstance(column, h5py.Dataset) else column.get("codes", column.get("values"))
        if isinstance(values, h5py.Dataset) and key != "__categories" and (values.shape or (0,))[0] != n:
            wrong.append(f"{key}: {(values.shape or (0,))[0]}")
    if wrong:
        return [error(f"{len(wrong)} columns of {name} are not {n} long", _AGAIN, count=len(wrong), first=wrong)]
    return []


def _length_problems(file: h5py.File, frames: Sequence[str], matrix: CountMatrix, place: str) -> list[Finding]:
    lengths = []
    for name in frames:
        node = file[name]
        lengths.append(len(node if isinstance(node, h5py.Dataset) else node[_index_of(node)]))
    if tuple(lengths) == matrix.shape:
        return []
    have, want = (" x ".join(f"{n:,}" for n in shape) for shape in (lengths, matrix.shape))
    return [error(f"lengths differ: obs and var are for {have}, {place} is {want}", _AGAIN)]


def _index_of(node: h5py.Group) -> str:
    index = node.attrs.get("_index")
    return index.decode() if isinstance(index, bytes) else index


def _frame(file: h5py.File, place: str, found: Examined) -> pd.DataFrame | None:
    """A table; None after saying why it cannot be read."""
    try:
        node = file[place]
        if isinstance(node, h5py.Group):
            import anndata

            return anndata.io.read_elem(node)
        rows = node[:]
        columns = {n: _decoded(rows[n]) for n in rows.dtype.names}
        for name in [n for n in columns if f"uns/{n}_categories" in file]:
            classes = _decoded(file[f"uns/{name}_categories"][:])
            codes = columns[name].astype(int)
            columns[name] = pd.Categorical.from_codes(codes, categories=list(classes))
        return pd.DataFrame(columns).set_index(rows.dtype.names[0])
    except Exception as problem:  # any: a stranger's file in a foreign reader
        line = (str(problem).splitlines() or [""])[0][:160]
        found.findings.append(error(f"{place} cannot be read ({type(problem).__name__}: {shown(line)})", _AGAIN))
        return None


def _decoded(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "SO":
        return values
    return np.array([x.decode("utf-8", "replace") if isinstance(x, bytes) else str(x) for x in values], dtype=object)


def _var_place(file: h5py.File, layer: str | None) -> str:
    if layer != "raw":
        return "var"
    return "raw/var" if "raw" in file else "raw.var"


def _matrix_place(file: h5py.File, layer: str | None) -> str:
    return {None: "X", "raw": "raw/X" if "raw" in file else "raw.X"}.get(layer, f"layers/{layer}")


def _names(
    found: Examined, obs: pd.DataFrame | None, var: pd.DataFrame | None, labels: Sequence[str], gene_id: str | None
) -> None:
    if obs is not None:
        names = pd.Series(obs.index.astype(str))
        found.findings += [*cell_findings(names), *label_findings(obs, labels, names)]
        found.facts |= {"cells": len(obs), "obs columns": [str(c) for c in obs.columns]}
        found.facts["suggested labels"] = suggested_labels(obs, names)
        found.facts["classes"] = {c: class_counts(obs[c]) for c in labels if c in obs}
    if var is not None:
        found.facts |= {"genes": len(var), "var columns": [str(c) for c in var.columns]}
        if gene_id is not None and gene_id not in var:
            columns = ", ".join(map(shown, var.columns)) or "none"
            found.findings.append(error(f"var has no column {gene_id!r}", f"set gene_id to one of: {columns}"))
        else:
            ids = var.index if gene_id is None else var[gene_id]
            found.findings += gene_findings([str(x) for x in ids], ensembl_columns(var))


# ---- counts ------------------------------------------------------------------------------------------------------
def _counts(
    found: Examined, matrix: CountMatrix, place: str, obs: pd.DataFrame | None, var: pd.DataFrame | None,
    places: list[str],
) -> None:  # fmt: skip
    def where(cell: int, gene: int) -> str:
        cell_name = [f"cell {cell if obs is None else obs.index[cell]}"] if cell >= 0 else []
        return ", ".join(cell_name + ([f"gene {gene if var is None else var.index[gene]}"] if gene >= 0 else []))

    try:
        audit = CountAudit(*matrix.shape, where)
        for piece in pieces(matrix, found.findings, place):
            audit.add(piece)
    except DAMAGE as problem:
        line = (str(problem).splitlines() or [""])[0][:160]
        what = f"{place} cannot be read to its end ({type(problem).__name__}: {shown(line)})"
        found.findings.append(error(what, "the file is damaged: copy or download it again"))
        return
    found.facts |= {"stored values": audit.stored, "largest value": audit.largest, "values are": audit.guess()}
    found.findings += audit.findings(places)


def _elsewhere(places: list[str]) -> str:
    return f"set ingest.source.{' or '.join(places)}" if places else "it holds no counts"


def _places(file: h5py.File) -> list[str]:
    """Places whose first values are whole numbers, as config text."""
    layers = {str(k): f"layers/{k}" for k in file["layers"]} if isinstance(file.get("layers"), h5py.Group) else {}
    candidates = {"null": "X", "raw": "raw/X" if "raw/X" in file else "raw.X", **layers}
    return [f"layer: {name}" for name, place in candidates.items() if place in file and _whole(file[place], place)]


def _whole(node: Any, place: str) -> bool:
    try:
        matrix = find_matrix(node, place)
        if isinstance(matrix, Finding):
            return False
        values = matrix.node[:50] if matrix.kind == "dense" else matrix.node["data"][:10_000]
        return values.size > 0 and bool(np.any(values)) and not any(bad.any() for _, bad in value_faults(values))
    except DAMAGE:
        return False
