"""Cells kept on a disk near the workers: read instead of SOMA, the same rows byte for byte.

Convention: a cache holds every eligible cell once, in storage order, with all columns of a block but the labels. Those
come from the stage's table of cells, so jobs with other labels or another split share a cache. A shard is an Arrow IPC
file (lz4) of whole storage tiles in record batches of 128 rows: reading a whole shard is as fast as with any other
size, and a few scattered rows cost little. Ids and tile are those of SOMA, so the order of cells is the same too.
`cache_writer.py` writes it, `arrow_shards.py` reads the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.core.manifest import MANIFEST
from pipeline.data.loading.arrow_shards import ArrowShards
from pipeline.data.loading.blocks import LABEL, SomaBlocks, positions
from scldm.errors import InputError

BATCH_ROWS = 128
FORMAT = 1


@dataclass(frozen=True)
class CacheRows:
    """Rows of one read."""

    ids: np.ndarray  # soma_joinids in the requested order, int64
    at: np.ndarray  # row number of each in the cache, int64
    codes: Mapping[str, np.ndarray]  # label -> class ids, int32


@dataclass(frozen=True)
class CacheReader:
    """Reads blocks from a cache; small and picklable."""

    folder: str
    files: tuple[tuple[str, int], ...]  # name and number of rows of each shard, in storage order
    schema: pa.Schema  # of a block, labels among its columns
    row_bytes: int

    @cached_property
    def shards(self) -> ArrowShards:
        return ArrowShards(self.folder, self.files, BATCH_ROWS, "cache", _remedy(self.folder), checksums=True)

    def read(self, rows: CacheRows) -> pa.Table:
        """Return the rows in the requested order, labels included.

        Raises:
            InputError: the cache is damaged, or holds other cells than the ingest that names it.
        """
        stored = [field for field in self.schema if not field.name.startswith(LABEL)]
        columns = dict(zip((field.name for field in stored), self.shards.read(rows.at, stored), strict=True))
        columns |= {LABEL + name: pa.array(codes) for name, codes in rows.codes.items()}
        table = pa.Table.from_arrays([columns[field.name] for field in self.schema], schema=self.schema)
        if not np.array_equal(table["soma_joinid"].to_numpy(), rows.ids):
            raise InputError(f"{self.folder} holds other cells than the ingest that names it; {_remedy(self.folder)}")
        return table


@dataclass(frozen=True)
class CacheBlocks:
    """Cells of an ingested experiment, read from its cache; interchangeable with SomaBlocks."""

    ids: np.ndarray
    codes: Mapping[str, np.ndarray]  # label -> int32, one per id
    tile: int
    at: np.ndarray  # row number in the cache, one per id
    reader: CacheReader

    def rows(self, ids: np.ndarray) -> CacheRows:
        i = positions(self.ids, ids)
        return CacheRows(np.ascontiguousarray(ids, np.int64), self.at[i], {k: v[i] for k, v in self.codes.items()})

    def read(self, ids: np.ndarray) -> pa.Table:
        return self.reader.read(self.rows(ids))


def cached(source: SomaBlocks, folder: Path, all_ids: np.ndarray) -> CacheBlocks:
    """Return the cells of `source`, read from a cache.

    Args:
        source: Blocks in SOMA of some of the cells.
        folder: Folder of the cache.
        all_ids: Cells that the cache holds: all of the ingest, sorted.

    Raises:
        InputError: the cache is missing, unfinished, or of another number of cells.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"the cache {folder} is missing or was never finished; {_remedy(folder)}")
    manifest = json.loads(path.read_text())
    if manifest.get("format", FORMAT) > FORMAT:
        raise InputError(
            f"the cache {folder} was written by a newer version of scldm (format {manifest['format']}, this version "
            f"reads {FORMAT}); upgrade scldm"
        )
    files = tuple((s["file"], s["n_cells"]) for s in manifest["shards"])
    n_cells = sum(rows for _, rows in files)
    if n_cells != len(all_ids):
        raise InputError(f"the cache {folder} holds {n_cells} cells, its ingest {len(all_ids)}; {_remedy(folder)}")
    reader = CacheReader(str(folder), files, source.reader.schema, source.reader.row_bytes)
    return CacheBlocks(source.ids, source.codes, source.tile, np.searchsorted(all_ids, source.ids), reader)


def _remedy(folder: Path | str) -> str:
    return (
        "delete manifest.json of the ingest that names this cache and run its job again: intact shards are kept, and "
        f"the rest of {folder} is written again"
    )
