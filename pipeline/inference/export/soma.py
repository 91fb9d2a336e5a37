"""Exports committed shards of cells to a Census-shaped SOMA experiment, with one writer.

X is written first, in order and in large writes; then latents; obs and var last. TileDB makes each write visible as a
whole or not at all, and writes are in order, so the content shows where an interrupted export resumes. The experiment
gets its name when it is complete.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from pipeline.core.files import replaces
from pipeline.data.soma.library import soma
from pipeline.data.soma.store import TILE
from pipeline.data.soma.write import in_tile_order, write_frame, x_layout
from scldm.cells.cells import Cells
from scldm.data.cell_counts import is_log_normalised
from scldm.errors import InputError

ROWS_PER_WRITE = 32 * TILE  # one TileDB fragment each: few, so that no consolidation is needed


def export_soma(cells: Cells, out: Path, *, rows_per_write: int = ROWS_PER_WRITE) -> None:
    """Write the experiment `out` (a local folder): ms/RNA/X/raw, obsm/X_scldm, var and obs.

    obs has soma_joinid, obs_id, raw_sum and nnz as the Census has them, and the columns of the cells.

    Raises:
        InputError: the cells have no counts, or `out` exists.
    """
    if "://" in str(out):
        raise InputError(f"{out}: the experiment gets its name by rename; write it to a local folder, then copy it")
    if out.exists():
        raise InputError(f"{out} exists already; name another folder, or remove it")
    if not cells.n_vars or not cells.n_obs:
        raise InputError(f"{cells.folder} holds {cells.n_obs} cells x {cells.n_vars} genes: no counts to write")
    as_file = f"scldm cells export {shlex.quote(str(cells.folder))} cells.h5ad --to h5ad"
    if cells[:1].X is None:
        raise InputError(f"{cells.folder} holds no counts (X): SOMA takes counts; to keep layers: {as_file}")
    if is_log_normalised(cells.uns):
        raise InputError(
            f"{cells.folder} holds log1p CP10k values of a gaussian head: SOMA's X/raw takes counts; instead: {as_file}"
        )
    partial = out.with_name(f".{out.name}.partial")
    mark = partial.with_suffix(".json")
    _begin(partial, mark, {"cells": [s.sha256 for s in cells.shards], "rows_per_write": rows_per_write})
    raw_sum, nnz, gene_nnz = _write_x(partial, cells, rows_per_write)
    _write_obsm(partial, cells, rows_per_write)
    var = pd.DataFrame(
        {"feature_id": cells.var.index.astype(str), "feature_name": cells.var["feature_name"].to_numpy()}
    )
    obs = cells.obs.rename(columns={"nnz": "nnz_", "raw_sum": "raw_sum_"}).assign(raw_sum=raw_sum, nnz=nnz)
    obs.insert(0, "obs_id", cells.obs_names.astype(str))
    for parent, name, frame in ((partial / "ms" / "RNA", "var", var.assign(nnz=gene_nnz)), (partial, "obs", obs)):
        _replace_frame(parent, name, frame)
    partial.rename(out)
    mark.unlink()


def _begin(partial: Path, mark: Path, settings: dict[str, Any]) -> None:
    """Keep what an interrupted export of the same cells left, or start empty."""
    if partial.is_dir() and mark.is_file() and json.loads(mark.read_text()) == settings:
        return
    shutil.rmtree(partial, ignore_errors=True)
    with replaces(mark) as tmp:
        tmp.write_text(json.dumps(settings))


# ---- X -----------------------------------------------------------------------------------------------------------
def _write_x(folder: Path, cells: Cells, rows_per_write: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write the counts that are missing; return sum and number of genes per cell, and number of cells per gene."""
    raw_sum, nnz = np.zeros(cells.n_obs), np.zeros(cells.n_obs, np.int64)
    gene_nnz = np.zeros(cells.n_vars, np.int64)
    written = _open_x(folder, cells.shape)
    for start, part in _pieces(cells, rows_per_write):
        chunk = sp.csr_matrix(part.X, dtype=np.float32)
        chunk.eliminate_zeros()
        stop = start + chunk.shape[0]
        raw_sum[start:stop] = np.asarray(chunk.sum(1, dtype=np.float64)).ravel()
        nnz[start:stop] = np.diff(chunk.indptr)
        gene_nnz += np.bincount(chunk.indices, minlength=cells.n_vars)
        if (
            chunk.nnz and start > written
        ):  # a write is complete or absent, and starts after the last row of the one before
            table = in_tile_order(chunk.tocoo(), start, TILE)
            with soma.open(str(folder / "ms" / "RNA" / "X" / "raw"), "w") as array:
                array.write(table, platform_config=soma.TileDBWriteOptions(sort_coords=False))
    return raw_sum, nnz, gene_nnz


def _open_x(folder: Path, shape: tuple[int, int]) -> int:
    """Create the experiment if it does not exist; return the last row of X, -1 if it is empty."""
    place = folder / "ms" / "RNA" / "X" / "raw"
    if not soma.Experiment.exists(str(folder)) or not soma.SparseNDArray.exists(str(place)):
        shutil.rmtree(folder, ignore_errors=True)
        with soma.Experiment.create(str(folder)) as experiment:
            rna = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
            rna.add_new_collection("X").add_new_sparse_ndarray(
                "raw", type=pa.float32(), shape=shape, platform_config={"tiledb": {"create": x_layout(TILE, TILE)}}
            )
        return -1
    with soma.open(str(place)) as array:
        domain = array.non_empty_domain()
        return int(domain[0][1]) if array.nnz else -1


def _pieces(cells: Cells, rows: int) -> Iterator[tuple[int, anndata.AnnData]]:
    start = 0
    for part in cells.batches(rows):
        yield start, part
        start += part.n_obs


# ---- obsm, obs, var ----------------------------------------------------------------------------------------------
def _write_obsm(folder: Path, cells: Cells, rows_per_write: int) -> None:
    """Write arrays of cells in the sparse form of the Census's embeddings; starts again if it was interrupted."""
    measurement = folder / "ms" / "RNA"
    with soma.open(str(measurement), "w") as rna:
        if "obsm" in rna:
            del rna["obsm"]
    shutil.rmtree(measurement / "obsm", ignore_errors=True)
    with soma.open(str(measurement), "w") as rna:
        rna.add_new_collection("obsm")
    for name, first in cells[:1].obsm.items():
        width = first.shape[1]
        with soma.open(str(measurement / "obsm"), "w") as collection:
            collection.add_new_sparse_ndarray(
                name, type=pa.float32(), shape=(cells.n_obs, width),
                platform_config={"tiledb": {"create": x_layout(TILE, width)}},
            )  # fmt: skip
        for start, part in _pieces(cells, rows_per_write):
            values = np.ascontiguousarray(part.obsm[name], np.float32)
            row = np.repeat(np.arange(start, start + len(values), dtype=np.int64), width)
            column = np.tile(np.arange(width, dtype=np.int64), len(values))
            table = pa.table({"soma_dim_0": row, "soma_dim_1": column, "soma_data": values.ravel()})
            with soma.open(str(measurement / "obsm" / name), "w") as array:
                array.write(table)


def _replace_frame(parent: Path, name: str, frame: pd.DataFrame) -> None:
    with soma.open(str(parent), "w") as collection:
        if name in collection:
            del collection[name]
    shutil.rmtree(parent / name, ignore_errors=True)
    write_frame(parent, name, frame)
