"""What a path holds that is no source of cells, and how its cells become one. Looked at by name; nothing is opened.

Zarr stores are not read: what unpacks an array is named by the store itself, and among the codecs is pickle.
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
    """What a path is and what to do about it; None if there is nothing to say."""
    if path.is_dir():
        if any((path / name).is_file() for name in _ZARR):
            return "a Zarr store, which is not read: anndata.read_zarr(path).write_h5ad(...) where you trust it"
        return None
    return next((said for end, said in _ENDINGS.items() if path.name.lower().endswith(end)), None)
