"""Recognises formats that are not read as cells, by their names alone, and explains how to convert them.

Zarr stores are not read: a store itself names the codec that unpacks an array, and pickle is among the codecs.
"""

from __future__ import annotations

from pathlib import Path

_ZARR = (".zgroup", ".zarray", ".zattrs", "zarr.json")
_ENDINGS = {
    ".loom": "a Loom file: anndata.io.read_loom(path).write_h5ad(...)",
    ".rds": "an R object: in R, zellkonverter::writeH5AD(...) or SeuratDisk::SaveH5Seurat(...)",
    ".csv": "a table: make an AnnData of it and call write_h5ad(...)",
    ".tsv": "a table: make an AnnData of it and call write_h5ad(...)",
    ".mtx": "one file of a Cell Ranger output: name its folder",
    ".gz": "packed: unpack it first (gunzip, or tar -xf)",
    ".zip": "packed: unpack it first",
    ".tar": "packed: unpack it first (tar -xf)",
}


def other_format(path: Path) -> str | None:
    """Return what a path is and how to convert it; None if it is not a known other format."""
    if path.is_dir():
        if any((path / name).is_file() for name in _ZARR):
            return "a Zarr store, which is not read: anndata.read_zarr(path).write_h5ad(...) if you trust it"
        return None
    return next((text for end, text in _ENDINGS.items() if path.name.lower().endswith(end)), None)
