"""Cells kept on a disk near the workers: read instead of SOMA, the same rows byte for byte.

Convention: a cache holds every eligible cell once, in storage order, with all columns of a block but the labels. Those
come from the stage's table of cells, so jobs with other labels or another split share a cache. A shard is an Arrow IPC
file (lz4) of whole storage tiles in record batches of 128 rows: as quick to read whole as any, and a few scattered rows
cost little. Ids and tile are those of SOMA, so the order of cells is the same too. `cache_writer.py` writes it.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pyarrow as pa

from pipeline.core.manifest import MANIFEST
from pipeline.data.loading.blocks import LABEL
from scldm.errors import InputError

BATCH_ROWS = 128
MOST_OPEN_SHARDS = 64


@dataclass(frozen=True)
class CacheRows:
    ids: np.ndarray  # int64, in the order wanted
    at: np.ndarray  # where each is in the cache, int64
    codes: Mapping[str, np.ndarray]  # label -> class ids, int32


@dataclass(frozen=True)
class CacheReader:
    folder: str
    files: tuple[str, ...]  # shards in storage order
    starts: np.ndarray  # position of the first row of each shard, and behind the last
    schema: pa.Schema  # of a block, labels among its columns
    row_bytes: int

    def read(self, rows: CacheRows) -> pa.Table:
        """The rows in the order wanted; every row is copied once, from where it lies to where it goes."""
        pieces = self._pieces(rows.at)
        columns = []
        for field in self.schema:
            if field.name.startswith(LABEL):
                columns.append(pa.array(rows.codes[field.name.removeprefix(LABEL)]))
            elif pa.types.is_list(field.type):
                columns.append(_gather_lists(pieces, field.name, len(rows.at), field.type))
            else:
                columns.append(_gather(pieces, field.name, len(rows.at), field.type))
        table = pa.Table.from_arrays(columns, schema=self.schema)
        if not np.array_equal(table["soma_joinid"].to_numpy(), rows.ids):
            raise InputError(f"{self.folder} holds other cells than the ingest that names it; {_remedy(self.folder)}")
        return table

    def _pieces(self, at: np.ndarray) -> list[_Piece]:
        """Record batches that hold the rows, each read once."""
        order = np.argsort(at, kind="stable")
        sorted_at = at[order]
        shard = np.searchsorted(self.starts, sorted_at, side="right") - 1
        local = sorted_at - self.starts[shard]
        batch = local // BATCH_ROWS
        cuts = np.flatnonzero((np.diff(shard) != 0) | (np.diff(batch) != 0)) + 1
        pieces = []
        for a, b in zip(np.r_[0, cuts], np.r_[cuts, len(at)], strict=True):
            if a < b:
                number = int(batch[a])
                found = _shard(str(Path(self.folder) / self.files[int(shard[a])])).batch(number)
                pieces.append(_Piece(found, local[a:b] - number * BATCH_ROWS, order[a:b]))
        return pieces


@dataclass(frozen=True)
class CacheBlocks:
    """Cells of an ingested experiment from its cache; stands in for SomaBlocks."""

    ids: np.ndarray
    codes: Mapping[str, np.ndarray]  # label -> int32, beside ids
    tile: int
    at: np.ndarray  # position in the cache, beside ids
    reader: CacheReader

    def rows(self, ids: np.ndarray) -> CacheRows:
        i = np.searchsorted(self.ids, ids)
        if len(ids) and (i.max() >= len(self.ids) or (self.ids[i] != ids).any()):
            raise ValueError("some ids are not among the cells of this source")
        return CacheRows(np.ascontiguousarray(ids, np.int64), self.at[i], {k: v[i] for k, v in self.codes.items()})

    def read(self, ids: np.ndarray) -> pa.Table:
        return self.reader.read(self.rows(ids))


def cached(source: Any, folder: Path, all_ids: np.ndarray) -> CacheBlocks:
    """The cells of `source`, read from a cache.

    Args:
        source: Blocks in SOMA of some of the cells.
        folder: Of the cache.
        all_ids: Cells that the cache holds: all of the ingest, sorted.

    Raises:
        InputError: if the cache is not there, not finished, or of another number of cells.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"the cache {folder} is gone or was never finished; {_remedy(folder)}")
    shards = json.loads(path.read_text())["shards"]
    starts = np.concatenate([[0], np.cumsum([s["n_cells"] for s in shards], dtype=np.int64)])
    if starts[-1] != len(all_ids):
        raise InputError(f"the cache {folder} holds {starts[-1]} cells, its ingest {len(all_ids)}; {_remedy(folder)}")
    files = tuple(s["file"] for s in shards)
    # A block and the record batches it is put together from are in memory at once.
    reader = CacheReader(str(folder), files, starts, source.reader.schema, source.reader.row_bytes)
    return CacheBlocks(source.ids, source.codes, source.tile, np.searchsorted(all_ids, source.ids), reader)


# ---- rows --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Piece:
    batch: pa.RecordBatch
    rows: np.ndarray  # of the batch
    to: np.ndarray  # where they go


def _gather(pieces: list[_Piece], name: str, n: int, type_: pa.DataType) -> pa.Array:
    out = np.empty(n, type_.to_pandas_dtype())
    for piece in pieces:
        out[piece.to] = piece.batch.column(name).to_numpy()[piece.rows]
    return pa.array(out, type_)


def _gather_lists(pieces: list[_Piece], name: str, n: int, type_: pa.ListType) -> pa.Array:
    """Row by row to its place: Arrow's `take` on lists, behind a concatenation, takes many times as long."""
    sizes = np.empty(n, np.int64)
    for piece in pieces:
        sizes[piece.to] = np.diff(piece.batch.column(name).offsets.to_numpy())[piece.rows]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    values = np.empty(ends[-1], type_.value_type.to_pandas_dtype())
    for piece in pieces:
        column = piece.batch.column(name)
        _copy_rows(column.values.to_numpy(), column.offsets.to_numpy(), piece.rows, ends[piece.to], values)
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(values, type_.value_type))


@numba.njit(cache=True, nogil=True)
def _copy_rows(source, offsets, rows, places, out):
    for i in range(len(rows)):
        start, stop = offsets[rows[i]], offsets[rows[i] + 1]
        out[places[i] : places[i] + stop - start] = source[start:stop]


# ---- shards ------------------------------------------------------------------------------------------------------
class _Shard:
    """An open shard; every record batch is checked against the checksum taken when it was written."""

    def __init__(self, path: str):
        self.path = path
        try:
            self._batches = json.loads(record_path(Path(path)).read_text())["batches"]
            self._bytes = pa.memory_map(path).read_buffer()
            self._file = pa.ipc.open_file(self._bytes)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise _damaged(path, str(error).splitlines()[0]) from error

    def batch(self, number: int) -> pa.RecordBatch:
        offset, length, checksum = self._batches[number]
        if zlib.crc32(self._bytes.slice(offset, length)) != checksum:
            raise _damaged(self.path, f"record batch {number} does not have its checksum")
        return self._file.get_batch(number)


def record_path(shard: Path) -> Path:
    """The record beside a shard: its sha256, and place and checksum of each record batch."""
    return shard.with_name(shard.name.partition("-")[0] + ".json")


_SHARDS: OrderedDict[str, _Shard] = OrderedDict()


def _shard(path: str) -> _Shard:
    """Per process, the shards used last stay open."""
    if path not in _SHARDS:
        _SHARDS[path] = _Shard(path)
        if len(_SHARDS) > MOST_OPEN_SHARDS:
            _SHARDS.popitem(last=False)
    _SHARDS.move_to_end(path)
    return _SHARDS[path]


def _damaged(path: str, why: str) -> InputError:
    return InputError(f"the cache shard {path} is missing or damaged ({why}); {_remedy(Path(path).parent)}")


def _remedy(folder: Path | str) -> str:
    return (
        "delete manifest.json of the ingest that names this cache and run its job again: what is whole is kept, and "
        f"the rest of {folder} is made again"
    )
