"""Recognises formats that are not read as cells, by their names alone, and explains how to convert them.

Zarr stores are not read: a store itself names the codec that unpacks an array, and pickle is among the codecs.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pipeline.config.paths.cell_files import is_left_by_macos

_ZARR = (".zgroup", ".zarray", ".zattrs", "zarr.json")
LOOM = "a Loom file: scanpy.read_loom(path).write_h5ad(...)"
MUDATA = "a MuData file of several assays: mudata.read_h5mu(path)['rna'].write_h5ad(...)"
_MACOS = "what macOS wrote beside a file, without its content: name the file without the ._ before its name"
_ENDINGS = {
    ".loom": LOOM,
    ".h5mu": MUDATA,
    ".rds": "an R object: in R, zellkonverter::writeH5AD(...) or SeuratDisk::SaveH5Seurat(...)",
    ".csv": "a table: make an AnnData of it and call write_h5ad(...)",
    ".tsv": "a table: make an AnnData of it and call write_h5ad(...)",
    ".mtx": "one file of a Cell Ranger output: name its folder",
    ".gz": "packed: unpack it first (gunzip, or tar -xf)",
    ".zip": "packed: unpack it first",
    ".tar": "packed: unpack it first (tar -xf)",
}


def other_hdf5(names: Collection[str]) -> str | None:
    """Return what an HDF5 file is and how to convert it, by what it holds; None if it is not a known other format."""
    if {"matrix", "row_attrs", "col_attrs"} <= set(names):
        return LOOM
    return MUDATA if "mod" in names and "X" not in names else None


def other_format(path: Path) -> str | None:
    """Return what a path is and how to convert it; None if it is not a known other format."""
    if path.is_dir():
        if any((path / name).is_file() for name in _ZARR):
            return "a Zarr store, which is not read: anndata.read_zarr(path).write_h5ad(...) if you trust it"
        return None
    if is_left_by_macos(path):
        return _MACOS
    return next((text for end, text in _ENDINGS.items() if path.name.lower().endswith(end)), None)
