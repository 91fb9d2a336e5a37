"""Writes cells into a Census-shaped SOMA experiment, which gets its name when it is complete.

Counts are written in the order in which TileDB stores them, in few large writes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from pipeline.data.entries import CountEntries
from pipeline.data.soma.library import soma
from pipeline.data.soma.store import TILE, SomaStore
from pipeline.data.validation.cell_hashes import CellHashes

ROWS_PER_WRITE = 8 * TILE  # one TileDB fragment each
_ZSTD = {"_type": "ZstdFilter", "level": 9}
_FRAME = {
    "dims": {"soma_joinid": {"filters": ["DoubleDeltaFilter", _ZSTD]}},
    "offsets_filters": ["DoubleDeltaFilter", _ZSTD],
    "capacity": 1 << 16,
}


def write_experiment(
    folder: Path, obs: pd.DataFrame, var: pd.DataFrame, chunks: Iterable[sp.csr_matrix], *, tile: int = TILE
) -> SomaStore:
    """Write a Census-shaped experiment; `folder` appears when it is complete. Memory: a few chunks.

    Args:
        obs: One row per cell, in the order of the chunks; columns as the Census names them. soma_joinid, raw_sum, nnz
            and the hashes of the counts are added here.
        var: feature_id, feature_name, feature_length; soma_joinid and nnz are added here.
        chunks: Rows of counts, CSR, all genes wide.
        tile: Cells and genes of a storage tile.
    """
    tmp = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        raw_sum, nnz, gene_nnz, hashes = _write_counts(tmp, len(obs), len(var), chunks, tile)
        write_frame(tmp, "obs", obs.assign(raw_sum=raw_sum, nnz=nnz, **hashes.columns()))
        write_frame(tmp / "ms" / "RNA", "var", var.assign(nnz=gene_nnz))
        if folder.exists():
            shutil.rmtree(folder)  # left by a run that did not finish its stage
        tmp.rename(folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    store = SomaStore(str(folder))
    store.forget()  # handles on an earlier folder of that name
    return store


def _write_counts(
    folder: Path, n_cells: int, n_genes: int, chunks: Iterable[sp.csr_matrix], tile: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, CellHashes]:
    """Write the experiment with its X; return sum, number of genes and hash per cell, and number of cells per gene."""
    hashes = CellHashes(n_cells)
    raw_sum, nnz, gene_nnz = np.zeros(n_cells), np.zeros(n_cells, np.int64), np.zeros(n_genes, np.int64)
    with soma.Experiment.create(str(folder)) as experiment:
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
        array = rna.add_new_collection("X").add_new_sparse_ndarray(
            "raw",
            type=pa.float32(),
            shape=(n_cells, n_genes),
            platform_config={"tiledb": {"create": x_layout(tile, tile)}},
        )
        row = 0
        for chunk in _pieces(chunks):
            coo = chunk.tocoo()
            sums, per_cell = np.asarray(chunk.sum(1, dtype=np.float64)).ravel(), np.diff(chunk.indptr)
            raw_sum[row : row + len(sums)], nnz[row : row + len(sums)] = sums, per_cell
            gene_nnz += np.bincount(coo.col, minlength=n_genes)
            if row + len(sums) <= n_cells:  # more is an error, below
                hashes.add(CountEntries(coo.row + row, coo.col, coo.data))
            if len(coo.data):
                array.write(in_tile_order(coo, row, tile), platform_config=soma.TileDBWriteOptions(sort_coords=False))
            row += len(sums)
    if row != n_cells:
        raise ValueError(f"obs has {n_cells} cells but the chunks hold {row}")
    return raw_sum, nnz, gene_nnz, hashes


def x_layout(tile: int, across: int) -> dict[str, Any]:
    """Return TileDB's options for X: tiles of `tile` cells by `across` genes (or other columns)."""
    shuffled = {"filters": ["ByteShuffleFilter", _ZSTD]}
    return {
        "capacity": 1 << 16,
        "dims": {"soma_dim_0": {"tile": tile, "filters": [_ZSTD]}, "soma_dim_1": {"tile": across, **shuffled}},
        "attrs": {"soma_data": shuffled},
        "cell_order": "row-major",
        "tile_order": "row-major",
        "allows_duplicates": True,
    }


def in_tile_order(coo: sp.coo_matrix, first_row: int, tile: int) -> pa.Table:
    """Sort the entries of rows `first_row` onwards as TileDB stores them: by tile, and by row and gene inside a tile.

    One stable sort on the tile's number is four times as fast as TileDB's own sort.
    """
    cells, genes = coo.row.astype(np.int64) + first_row, coo.col.astype(np.int64)
    tiles_across = coo.shape[1] // tile + 1
    number = (cells // tile - first_row // tile) * tiles_across + genes // tile
    small = number.max() < 1 << 16  # numpy sorts 16 bits by radix
    order = np.argsort(number.astype(np.uint16 if small else np.int64), kind="stable")
    counts = coo.data.astype(np.float32, copy=False)
    return pa.table({"soma_dim_0": cells[order], "soma_dim_1": genes[order], "soma_data": counts[order]})


def _pieces(chunks: Iterable[sp.csr_matrix]) -> Iterable[sp.csr_matrix]:
    """Join chunks up to ROWS_PER_WRITE and drop stored zeros: few fragments, little memory."""
    held: list[sp.csr_matrix] = []
    for chunk in chunks:
        chunk = sp.csr_matrix(chunk)
        chunk.sum_duplicates()  # and sorts by gene, which `in_tile_order` relies on
        chunk.eliminate_zeros()
        held.append(chunk)
        if sum(c.shape[0] for c in held) >= ROWS_PER_WRITE:
            yield sp.vstack(held, format="csr")
            held = []
    if held:
        yield sp.vstack(held, format="csr")


def write_frame(parent: Path, name: str, frame: pd.DataFrame) -> None:
    """Write a data frame into a SOMA collection; soma_joinid is its row number."""
    frame = frame.reset_index(drop=True).drop(columns="soma_joinid", errors="ignore")
    frame.insert(0, "soma_joinid", np.arange(len(frame), dtype=np.int64))
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata()
    with soma.open(str(parent), "w") as collection:
        collection.add_new_dataframe(
            name,
            schema=table.schema,
            index_column_names=["soma_joinid"],
            domain=[(0, max(0, len(frame) - 1))],
            platform_config={"tiledb": {"create": _FRAME}},
        )
    # In a separate handle: if written in the creating one (tiledbsoma 2.3), the categories are lost.
    with soma.open(str(parent / name), "w") as out:
        out.write(table)
