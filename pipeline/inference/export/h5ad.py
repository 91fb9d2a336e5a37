"""Exports all cells of a stage to one `.h5ad` file, copied shard by shard; for up to a million cells.

Takes the memory of a piece of a shard: sizes are read first, datasets are created at their final size and filled.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata.io import write_elem

from pipeline.core.files import replaces
from scldm.cells.cells import Cells
from scldm.errors import InputError

MAX_CELLS = 1_000_000
VALUES = 1 << 22  # values that are copied at a time
PACKED = {"compression": "gzip", "compression_opts": 1, "shuffle": True}


def export_h5ad(cells: Cells, out: Path) -> None:
    """Write the file `out` atomically.

    Raises:
        InputError: there are too many cells for one file, or `out` exists.
    """
    if cells.n_obs > MAX_CELLS:
        raise InputError(
            f"{cells.n_obs:,} cells are too many for one .h5ad file (at most {MAX_CELLS:,}); read the shards "
            f"(scldm.open_cells), or run scldm cells export {shlex.quote(str(cells.folder))} cells.zarr --to zarr"
        )
    if out.exists():
        raise InputError(f"{out} exists already; name another file, or remove it")
    obs, var, uns = cells.obs, cells.var, cells.uns  # read first: an error shows before a byte is written
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaces(out) as tmp, h5py.File(tmp, "w") as f:
        f.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            write_elem(f, name, {})
        _copy(cells, f)
        for name, element in (("obs", obs), ("var", var), ("uns", uns)):
            write_elem(f, name, element)


def _copy(cells: Cells, out: h5py.File) -> None:
    """Copy X, obsm and layers of all shards."""
    n_values, x_type = 0, None  # type of the values of X, if there is one
    dense: dict[str, Any] = {}  # name -> (shape behind the cells, type)
    for shard in cells.shards:
        with h5py.File(shard.path, "r") as f:
            n_values += len(f["X/data"]) if "X" in f else 0
            dense |= {f"{place}/{k}": f[place][k] for place in ("obsm", "layers") for k in f.get(place, ())}
            dense = {k: (v if isinstance(v, tuple) else (v.shape[1:], v.dtype)) for k, v in dense.items()}
            x_type = f["X/data"].dtype if "X" in f else None
    for name, (tail, kind) in dense.items():
        made = out.create_dataset(name, (cells.n_obs, *tail), kind, chunks=True if cells.n_obs else None,
                                  **(PACKED if cells.n_obs else {}))  # fmt: skip
        made.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    x = _new_csr(out, n_values, cells, x_type) if x_type is not None else None
    row = value = 0
    for shard in cells.shards:
        with h5py.File(shard.path, "r") as f:
            for name in dense:
                _fill(out[name], f[name], row)
            if x is not None:
                _fill(x["data"], f["X/data"], value)
                _fill(x["indices"], f["X/indices"], value)
                x["indptr"][row : row + shard.n_cells + 1] = f["X/indptr"][:].astype(np.int64) + value
                value += len(f["X/data"])
        row += shard.n_cells


def _new_csr(out: h5py.File, n_values: int, cells: Cells, kind: np.dtype[Any]) -> h5py.Group:
    x = out.create_group("X")
    x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    x.attrs["shape"] = np.array(cells.shape, dtype=np.int64)
    packed = {**PACKED, "chunks": True} if n_values else {}
    x.create_dataset("data", (n_values,), kind, **packed)
    x.create_dataset("indices", (n_values,), np.int32, **packed)
    x.create_dataset("indptr", (cells.n_obs + 1,), np.int64)
    return x


def _fill(target: Any, source: Any, start: int) -> None:
    rows = max(1, VALUES // max(1, int(np.prod(source.shape[1:]))))
    for i in range(0, len(source), rows):
        target[start + i : start + min(i + rows, len(source))] = source[i : i + rows]
