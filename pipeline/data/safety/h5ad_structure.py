"""Checks the structure of an untrusted `.h5ad` file, before any reader follows what it declares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py

from pipeline.data.findings import Finding, error
from pipeline.data.safety.count_matrix import CountMatrix, find_matrix, layout_problems
from pipeline.data.safety.formats import other_hdf5
from pipeline.data.safety.hdf5 import open_problems, unsafe
from scldm.text import shown

SAVE_AGAIN = "save it again from an intact copy"
# Errors that h5py, anndata, pandas and numpy raise for a damaged file.
DAMAGE = (OSError, KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, UnicodeError,
          NotImplementedError, OverflowError, MemoryError)  # fmt: skip


def structure_problems(path: Path, layer: str | None = None) -> list[Finding]:
    """Return why a reader must not open the file: it is unsafe, or shapes, pointers and lengths disagree."""
    if found := open_problems(path):
        return found
    try:
        return _structure_problems(path, layer)
    except DAMAGE as problem:
        return [damage(problem)]


def _structure_problems(path: Path, layer: str | None) -> list[Finding]:
    with h5py.File(path) as file:
        found = [f for f in unsafe(file) if f.level == "error"]
        if found:
            return found
        if known := other_hdf5(file):
            what, _, fix = known.partition(": ")
            return [error(f"the file is {what}", fix)]
        if absent := [k for k in ("obs", "var") if k not in file]:
            holds = ", ".join(sorted(map(shown, file))[:6]) or "nothing"
            what = f"the file is HDF5 but not .h5ad: it has no {' and no '.join(absent)} (it holds {holds})"
            if _is_cell_ranger(file):
                return [error(what, "a Cell Ranger file is read with ingest.source: {type: 10x, …}")]
            return [error(what, "name a file that adata.write_h5ad() wrote")]
        place, frames = matrix_path(file, layer), ("obs", var_path(file, layer))
        problems = [f for name in frames if name in file for f in _frame_problems(file[name], name)]
        matrix = find_matrix(file[place], place) if place in file else None
        if matrix is None or isinstance(matrix, Finding):
            return problems if matrix is None else [*problems, matrix]
        if not problems:  # anndata itself opens a file whose tables are shorter than its matrix
            problems = _length_problems(file, frames, matrix, place)
        return [*problems, *layout_problems(matrix, place)]


def _is_cell_ranger(file: h5py.File) -> bool:
    groups = [group for group in file.values() if isinstance(group, h5py.Group)]
    return "matrix" in file or any({"barcodes", "indptr"} <= set(group) for group in groups)


def damage(problem: BaseException) -> Finding:
    """Return a finding for an error of a reader."""
    lines = str(problem).splitlines() or ["no message"]
    return error(f"the file is damaged: {shown(lines[0][:200])} ({type(problem).__name__})", SAVE_AGAIN)


def _frame_problems(node: Any, name: str) -> list[Finding]:
    """Return columns that are missing or of unequal lengths; anndata's own message would be less clear."""
    if isinstance(node, h5py.Dataset):  # anndata before 0.7
        if node.dtype.names and node.ndim == 1:
            return []
        return [error(f"{name} is an array of {node.dtype}", f"it must be a table; {SAVE_AGAIN}")]
    index = _index_of(node)
    if not isinstance(index, str) or not isinstance(node.get(index), h5py.Dataset) or node[index].ndim != 1:
        return [error(f"{name} has no index of names (_index is {shown(index)!r})", SAVE_AGAIN)]
    n, wrong = len(node[index]), []
    for key in node:
        column = node[key]
        values = column if isinstance(column, h5py.Dataset) else column.get("codes", column.get("values"))
        if isinstance(values, h5py.Dataset) and key != "__categories" and (values.shape or (0,))[0] != n:
            wrong.append(f"{key}: {(values.shape or (0,))[0]}")
    if wrong:
        return [error(f"{len(wrong)} columns of {name} are not {n} long", SAVE_AGAIN, count=len(wrong), first=wrong)]
    return []


def _length_problems(file: h5py.File, frames: Sequence[str], matrix: CountMatrix, place: str) -> list[Finding]:
    lengths = []
    for name in frames:
        node = file[name]
        lengths.append(len(node if isinstance(node, h5py.Dataset) else node[_index_of(node)]))
    if tuple(lengths) == matrix.shape:
        return []
    have, want = (" x ".join(f"{n:,}" for n in shape) for shape in (lengths, matrix.shape))
    return [error(f"lengths differ: obs and var are for {have}, {place} is {want}", SAVE_AGAIN)]


def _index_of(node: h5py.Group) -> str:
    index = node.attrs.get("_index")
    return index.decode() if isinstance(index, bytes) else index


def layer_name(layer: str | None) -> str:
    """Return the name of a layer of the file: `layers/<name>` and `<name>` are the same."""
    return (layer or "").removeprefix("layers/")


def layer_setting(name: str) -> str:
    """Return the setting for a layer of the file: one called raw, which could be adata.raw, needs its place."""
    return f"layers/{name}" if name in ("raw", "null") else name


def var_path(file: h5py.File, layer: str | None) -> str:
    """Return the path of the genes that belong to a layer."""
    if layer != "raw":
        return "var"
    return "raw/var" if "raw" in file else "raw.var"


def matrix_path(file: h5py.File, layer: str | None) -> str:
    """Return the path of a layer's counts; None is X, "raw" is adata.raw."""
    return {None: "X", "raw": "raw/X" if "raw" in file else "raw.X"}.get(layer, f"layers/{layer_name(layer)}")
