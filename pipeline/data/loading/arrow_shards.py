"""Random access to rows of Arrow IPC shards: the one reader of cached counts and of latents.

Rows are numbered over all shards in order. Every shard is cut in record batches of a fixed number of rows, of which
only the last may be shorter, so that the place of a row follows from its number. A record batch is read once per call,
however many of its rows are wanted, and every row is copied once, from where it lies to where it goes. Files are
memory-mapped and stay open per process, the most recently used first.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numba
import numpy as np
import pyarrow as pa

from scldm.errors import InputError

MAX_OPEN_SHARDS = 64


@dataclass(frozen=True)
class ArrowShards:
    """Consecutive Arrow IPC files of one folder; picklable.

    Args:
        folder: Folder of the files.
        files: File name and number of rows of each shard, in order.
        batch_rows: Rows of a record batch.
        contents: What the shards hold, for messages: "cache", "latent".
        remedy: How to restore a missing or damaged shard, for messages.
        checksums: Whether each shard has a record (`record_path`) with a CRC-32 of every record batch, which is then
            compared on every read.
    """

    folder: str
    files: tuple[tuple[str, int], ...]
    batch_rows: int
    contents: str
    remedy: str
    checksums: bool = False

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of the first row of each shard, then the number of rows of all, (n_shards + 1,)."""
        return np.concatenate([[0], np.cumsum([rows for _, rows in self.files], dtype=np.int64)])

    @cached_property
    def schema(self) -> pa.Schema:
        """Schema of the first shard."""
        return self._open(0).schema

    def read(self, rows: np.ndarray, fields: Iterable[pa.Field]) -> list[pa.Array]:
        """Return columns of the given rows, in their order; repeats are allowed.

        Args:
            rows: Row numbers over all shards, (n,).
            fields: Columns and the types to return; numbers, lists or fixed-size lists of numbers, without nulls.

        Raises:
            InputError: a shard is missing, or is not what was written.
        """
        pieces = self._pieces(rows)
        return [_gather(pieces, field.name, len(rows), field.type) for field in fields]

    def _pieces(self, rows: np.ndarray) -> list[_Piece]:
        """Return the record batches that hold the rows, each once."""
        order = np.argsort(rows, kind="stable")
        sorted_rows = rows[order]
        shard = np.searchsorted(self.starts, sorted_rows, side="right") - 1
        local = sorted_rows - self.starts[shard]
        batch = local // self.batch_rows
        cuts = np.flatnonzero((np.diff(shard) != 0) | (np.diff(batch) != 0)) + 1
        pieces = []
        for a, b in zip(np.r_[0, cuts], np.r_[cuts, len(rows)], strict=True):
            if a < b:
                number = int(batch[a])
                found = self._open(int(shard[a])).batch(number)
                pieces.append(_Piece(found, local[a:b] - number * self.batch_rows, order[a:b]))
        return pieces

    def _open(self, shard: int) -> _OpenShard:
        path = str(Path(self.folder) / self.files[shard][0])
        if path not in _OPEN:
            _OPEN[path] = _OpenShard(path, self)
            if len(_OPEN) > MAX_OPEN_SHARDS:
                _OPEN.popitem(last=False)
        _OPEN.move_to_end(path)
        return _OPEN[path]


def record_path(shard: Path) -> Path:
    """Return the record of a shard with checksums: `000003-4f0d….arrow` has `000003.json`."""
    return shard.with_name(shard.name.partition("-")[0] + ".json")


def close_all() -> None:
    """Close the shards that this process has open."""
    _OPEN.clear()


# ---- files -------------------------------------------------------------------------------------------------------
class _OpenShard:
    """A memory-mapped shard, read by record batches."""

    def __init__(self, path: str, shards: ArrowShards):
        self.path, self._contents, self._remedy = path, shards.contents, shards.remedy
        self._batches: list[tuple[int, int, int]] | None = None  # offset, length and CRC-32 of each
        try:
            if shards.checksums:
                self._batches = json.loads(record_path(Path(path)).read_text())["batches"]
            self._bytes = pa.memory_map(path).read_buffer()
            self._file = pa.ipc.open_file(self._bytes)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise self._damaged(str(error).splitlines()[0]) from error
        self.schema = self._file.schema

    def batch(self, number: int) -> pa.RecordBatch:
        if self._batches is not None:
            offset, length, checksum = self._batches[number]
            if zlib.crc32(self._bytes.slice(offset, length)) != checksum:
                raise self._damaged(f"record batch {number} does not have its checksum")
        try:
            return self._file.get_batch(number)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(str(error).splitlines()[0]) from error

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"the {self._contents} shard {self.path} is missing or damaged ({reason}); {self._remedy}")


_OPEN: OrderedDict[str, _OpenShard] = OrderedDict()


# ---- rows --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Piece:
    """Rows that are taken from one record batch."""

    batch: pa.RecordBatch
    rows: np.ndarray  # positions in the batch
    to: np.ndarray  # positions in the result


def _gather(pieces: list[_Piece], name: str, n: int, type_: pa.DataType) -> pa.Array:
    if pa.types.is_list(type_):
        return _gather_lists(pieces, name, n, type_)
    if pa.types.is_fixed_size_list(type_):
        width = type_.list_size
        values = np.empty((n, width), type_.value_type.to_pandas_dtype())
        for piece in pieces:
            values[piece.to] = piece.batch.column(name).flatten().to_numpy().reshape(-1, width)[piece.rows]
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), type_.value_type), width)
    out = np.empty(n, type_.to_pandas_dtype())
    for piece in pieces:
        out[piece.to] = piece.batch.column(name).to_numpy()[piece.rows]
    return pa.array(out, type_)


def _gather_lists(pieces: list[_Piece], name: str, n: int, type_: pa.ListType) -> pa.Array:
    """Copy lists row by row: Arrow's `take` on lists after a concatenation takes many times as long."""
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
