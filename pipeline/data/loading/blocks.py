"""Where a block of cells is read from: counts in SOMA, or latents in Arrow IPC shards.

Convention: a source is plain data. What every read needs (`reader`) is kept apart from what one read needs (`rows`), so
that a Ray task carries its own few hundred kilobytes and the reader is shared. A table has one row per cell, in the
order of the ids that were asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from scldm.errors import InputError

LABEL = "label:"
RECORD_BATCH_ROWS = 2048
MOST_OPEN_FILES = 64


class NoRoom(RuntimeError):
    """Ray's object store and the disk behind it have no room for a block. It may be there at the next try."""


class Reader(Protocol):
    """What every read of a source needs; small, picklable."""

    @property
    def schema(self) -> pa.Schema: ...

    @property
    def row_bytes(self) -> int:
        """About how much memory a cell takes."""

    def read(self, rows: Any) -> pa.Table: ...


class BlockSource(Protocol):
    """Eligible cells and how to read any of them."""

    @property
    def ids(self) -> np.ndarray: ...  # sorted, unique, int64

    @property
    def tile(self) -> int: ...  # ids of one storage unit share id // tile

    @property
    def reader(self) -> Reader: ...

    def rows(self, ids: np.ndarray) -> Any: ...

    def read(self, ids: np.ndarray) -> pa.Table: ...


# ---- counts ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SomaReader:
    uri: str
    tiledb_config: Mapping[str, Any]
    measurement: str
    layer: str
    gene_lut: np.ndarray  # var soma_joinid -> gene id of the vocabulary, -1 drops the gene; int32
    labels: tuple[str, ...]
    count_type: Literal["uint16", "float32"]
    genes_per_cell: int = 2000  # for memory estimates
    seen_at: int = 0  # when the experiment was known to be there, in milliseconds since 1970

    @property
    def gene_type(self) -> pa.DataType:
        return pa.uint16() if self.gene_lut.max(initial=0) < 1 << 16 else pa.int32()

    @property
    def schema(self) -> pa.Schema:
        count = pa.uint16() if self.count_type == "uint16" else pa.float32()
        return pa.schema([
            ("soma_joinid", pa.int64()),
            ("gene", pa.list_(self.gene_type)),
            ("count", pa.list_(count)),
            *((LABEL + name, pa.int32()) for name in self.labels),
            ("library_size", pa.float32()),
        ])  # fmt: skip

    @property
    def row_bytes(self) -> int:
        return 32 + self.genes_per_cell * 6

    def read(self, rows: SomaRows) -> pa.Table:
        from pipeline.data.soma.assemble import CountsChanged
        from pipeline.data.soma.store import SomaStore

        store = SomaStore(self.uri, self.tiledb_config, self.measurement, self.layer, self.seen_at)
        gene_type = self.gene_type.to_pandas_dtype()
        try:
            r = store.read_ragged(rows.ids, self.gene_lut, gene_type=gene_type, count_type=self.count_type)
        except CountsChanged as error:
            raise InputError(
                f"{self.uri}: counts changed since ingest: some are no longer whole numbers up to 65535"
            ) from error
        offsets = pa.array(r.indptr.astype(np.int32))
        columns = [
            pa.array(rows.ids),
            pa.ListArray.from_arrays(offsets, pa.array(r.genes)),
            pa.ListArray.from_arrays(offsets, pa.array(r.counts)),
            *(pa.array(rows.codes[name]) for name in self.labels),
            pa.array(r.row_sums),
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)


@dataclass(frozen=True)
class SomaRows:
    ids: np.ndarray  # int64, in the order wanted
    codes: Mapping[str, np.ndarray]  # label -> class ids, int32


@dataclass(frozen=True)
class SomaBlocks:
    """Cells of an ingested experiment with their counts over the vocabulary.

    Columns: soma_joinid, gene: list, count: list, `label:<name>` for each label, library_size.
    """

    ids: np.ndarray
    codes: Mapping[str, np.ndarray]  # label -> int32, beside ids
    tile: int
    reader: SomaReader

    def rows(self, ids: np.ndarray) -> SomaRows:
        at = np.searchsorted(self.ids, ids)
        if len(ids) and (at.max() >= len(self.ids) or (self.ids[at] != ids).any()):
            raise ValueError("some ids are not among the cells of this source")
        return SomaRows(np.ascontiguousarray(ids, np.int64), {k: v[at] for k, v in self.codes.items()})

    def read(self, ids: np.ndarray) -> pa.Table:
        return self.reader.read(self.rows(ids))


# ---- latents -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class IpcReader:
    folder: str
    files: tuple[tuple[str, int], ...]  # name and number of rows of each shard
    batch_rows: int

    @cached_property
    def starts(self) -> np.ndarray:
        """Position of the first row of each shard, and behind the last."""
        return np.concatenate([[0], np.cumsum([rows for _, rows in self.files], dtype=np.int64)])

    @cached_property
    def schema(self) -> pa.Schema:
        return _open_ipc(str(Path(self.folder) / self.files[0][0])).schema

    @cached_property
    def row_bytes(self) -> int:
        total = sum((Path(self.folder) / name).stat().st_size for name, _ in self.files)
        return max(1, total // max(1, int(self.starts[-1])))

    def read(self, rows: np.ndarray) -> pa.Table:
        unique, inverse = np.unique(rows, return_inverse=True)
        shard = np.asarray(np.searchsorted(self.starts, unique, side="right")) - 1
        local = unique - self.starts[shard]
        batch = local // self.batch_rows
        cuts = np.flatnonzero((np.diff(shard) != 0) | (np.diff(batch) != 0)) + 1
        parts = []
        for start, stop in zip(np.r_[0, cuts], np.r_[cuts, len(unique)], strict=True):
            k, b = int(shard[start]), int(batch[start])
            found = _open_ipc(str(Path(self.folder) / self.files[k][0])).get_batch(b)
            parts.append(found.take(pa.array(local[start:stop] - b * self.batch_rows)))
        return pa.Table.from_batches(parts).take(pa.array(inverse)).combine_chunks()


@dataclass(frozen=True)
class IpcBlocks:
    """Rows of Arrow IPC shards, as `encode` writes them; an id is a row's position over all shards.

    Columns: soma_joinid, `label:<name>` for each label, log_library_size, latent: fixed_size_list<float32>.
    Every shard is cut in record batches of `tile` rows; only a shard's last one may be shorter.
    """

    folder: str
    files: tuple[tuple[str, int], ...]  # name and number of rows of each shard
    tile: int = RECORD_BATCH_ROWS

    @cached_property
    def ids(self) -> np.ndarray:
        return np.arange(sum(rows for _, rows in self.files), dtype=np.int64)

    @cached_property
    def reader(self) -> IpcReader:
        return IpcReader(self.folder, self.files, self.tile)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(ids, np.int64)

    def read(self, ids: np.ndarray) -> pa.Table:
        return self.reader.read(self.rows(ids))


_FILES: OrderedDict[str, Any] = OrderedDict()


def _open_ipc(path: str) -> Any:
    """Memory-mapped shard; per process, the last ones used stay open."""
    if path not in _FILES:
        if not Path(path).is_file():
            raise InputError(
                f"{path} is missing: the latent cache is not whole; delete its folder and run encode again"
            )
        _FILES[path] = pa.ipc.open_file(pa.memory_map(path))
        if len(_FILES) > MOST_OPEN_FILES:
            _FILES.popitem(last=False)
    _FILES.move_to_end(path)
    return _FILES[path]
