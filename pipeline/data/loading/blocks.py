"""Sources of blocks of cells: counts in SOMA, or latents in Arrow IPC shards.

Convention: a source is plain data. What every read needs (`reader`) is kept apart from what one read needs (`rows`), so
that a Ray task carries its own few hundred kilobytes and the reader is shared. A table has one row per cell, in the
order of the requested ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from pipeline.data.loading.arrow_shards import ArrowShards
from scldm.errors import InputError

LABEL = "label:"
RECORD_BATCH_ROWS = 2048


class NoRoom(RuntimeError):
    """Neither Ray's object store nor the disk behind it has space for a block; the next attempt may succeed."""


class Reader(Protocol):
    """What every read of a source needs; small, picklable."""

    @property
    def schema(self) -> pa.Schema: ...

    @property
    def row_bytes(self) -> int:
        """Return the approximate memory of a cell."""

    def read(self, rows: Any) -> pa.Table: ...


class BlockSource(Protocol):
    """Eligible cells and how to read any of them."""

    @property
    def ids(self) -> np.ndarray: ...  # sorted, unique, int64

    @property
    def tile(self) -> int: ...  # ids of one storage tile share id // tile

    @property
    def reader(self) -> Reader: ...

    def rows(self, ids: np.ndarray) -> Any: ...

    def read(self, ids: np.ndarray) -> pa.Table: ...


def positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the position of each wanted id in sorted `ids`.

    Raises:
        ValueError: an id is not among them.
    """
    at = np.searchsorted(ids, wanted)
    if len(wanted) and (at.max() >= len(ids) or (ids[at] != wanted).any()):
        raise ValueError("some ids are not among the cells of this source")
    return at


# ---- counts ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SomaReader:
    """Reads counts over the vocabulary from a SOMA experiment."""

    uri: str
    tiledb_config: Mapping[str, Any]
    measurement: str
    layer: str
    gene_lut: np.ndarray  # var soma_joinid -> gene id of the vocabulary, -1 drops the gene; int32
    labels: tuple[str, ...]
    count_type: Literal["uint16", "float32"]
    genes_per_cell: int = 2000  # for memory estimates
    seen_at: int = 0  # when the experiment was known to exist, in milliseconds since 1970

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

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the counts that are read, beside the experiment and its cells; plain data."""
        genes = hashlib.sha256(np.ascontiguousarray(self.gene_lut, np.int32).data).hexdigest()
        return {"measurement": self.measurement, "layer": self.layer, "genes": genes}

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
class JoinedReader:
    """Reads cells of two experiments as one: ids from `start` on are those of the second, moved by it."""

    first: SomaReader
    second: SomaReader
    start: int

    @property
    def uri(self) -> str:
        return self.first.uri

    @property
    def labels(self) -> tuple[str, ...]:
        return self.first.labels

    @property
    def schema(self) -> pa.Schema:
        return self.first.schema

    @property
    def row_bytes(self) -> int:
        return max(self.first.row_bytes, self.second.row_bytes)

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.first.identity, "second": self.second.identity, "start": self.start}

    def read(self, rows: SomaRows) -> pa.Table:
        of_second = rows.ids >= self.start
        if not of_second.any():
            return self.first.read(rows)
        sides = [np.flatnonzero(~of_second), np.flatnonzero(of_second)]
        parts = [
            reader.read(SomaRows(rows.ids[at] - moved, {k: v[at] for k, v in rows.codes.items()}))
            for reader, at, moved in zip((self.first, self.second), sides, (0, self.start), strict=True)
            if len(at)
        ]
        back = pa.array(parts[-1]["soma_joinid"].to_numpy() + self.start)
        parts[-1] = parts[-1].set_column(0, "soma_joinid", back).cast(self.schema)
        order = np.argsort(np.concatenate(sides), kind="stable")
        return pa.concat_tables(parts).combine_chunks().take(pa.array(order))


@dataclass(frozen=True)
class SomaRows:
    """Rows of one read."""

    ids: np.ndarray  # soma_joinids in the requested order, int64
    codes: Mapping[str, np.ndarray]  # label -> class ids, int32


@dataclass(frozen=True)
class SomaBlocks:
    """Cells of an ingested experiment with their counts over the vocabulary.

    Columns: soma_joinid, gene: list, count: list, `label:<name>` for each label, library_size.
    """

    ids: np.ndarray
    codes: Mapping[str, np.ndarray]  # label -> int32, one per id
    tile: int
    reader: SomaReader | JoinedReader

    def rows(self, ids: np.ndarray) -> SomaRows:
        at = positions(self.ids, ids)
        return SomaRows(np.ascontiguousarray(ids, np.int64), {k: v[at] for k, v in self.codes.items()})

    def read(self, ids: np.ndarray) -> pa.Table:
        return self.reader.read(self.rows(ids))


# ---- latents -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class IpcReader:
    """Reads rows of Arrow IPC shards by position."""

    folder: str
    files: tuple[tuple[str, int], ...]  # name and number of rows of each shard
    batch_rows: int
    made_by: str  # stage

    @cached_property
    def shards(self) -> ArrowShards:
        remedy = f"delete the folder of this {self.made_by} and run it again"
        return ArrowShards(self.folder, self.files, self.batch_rows, "latent", remedy)

    @property
    def schema(self) -> pa.Schema:
        return self.shards.schema

    @cached_property
    def row_bytes(self) -> int:
        total = sum((Path(self.folder) / name).stat().st_size for name, _ in self.files)
        return max(1, total // max(1, int(self.shards.starts[-1])))

    def read(self, rows: np.ndarray) -> pa.Table:
        return pa.Table.from_arrays(self.shards.read(rows, self.schema), schema=self.schema)


@dataclass(frozen=True)
class IpcBlocks:
    """Rows of Arrow IPC shards, as `encode` writes them; an id is a row's position over all shards.

    Columns: soma_joinid, `label:<name>` for each label, log_library_size, latent: fixed_size_list of float32 or
    float16.
    Every shard is cut in record batches of `tile` rows; only a shard's last one may be shorter.
    """

    folder: str
    files: tuple[tuple[str, int], ...]  # name and number of rows of each shard
    tile: int = RECORD_BATCH_ROWS
    made_by: str = "encode"  # stage

    @cached_property
    def ids(self) -> np.ndarray:
        return np.arange(sum(rows for _, rows in self.files), dtype=np.int64)

    @cached_property
    def reader(self) -> IpcReader:
        return IpcReader(self.folder, self.files, self.tile, self.made_by)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(ids, np.int64)

    def read(self, ids: np.ndarray) -> pa.Table:
        return self.reader.read(self.rows(ids))


def storage_blocks(source: BlockSource, block_rows: int) -> list[np.ndarray]:
    """Return all ids of a source in storage order, cut at storage tiles near every `block_rows`."""
    tiles = max(1, block_rows // source.tile)
    group = source.ids // (source.tile * tiles)
    return np.split(source.ids, np.flatnonzero(np.diff(group)) + 1)
