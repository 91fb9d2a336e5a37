"""Writes the cache: every eligible cell from SOMA, once, into ragged shards that many epochs and jobs then read.

A cache's folder is named by a hash of all that decides its bytes. Shards are named by their content and committed one
by one (`pipeline.core.shards`); the manifest is written last. So an interrupted run resumes, two jobs that write the
same cache at the same time do not disturb each other, and a shard that was damaged is detected and written again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.faults import fault_point
from pipeline.core.files import write_json_atomic
from pipeline.core.manifest import MANIFEST
from pipeline.core.shards import CommitPoints, Record, ShardStore
from pipeline.data.loading.blocks import LABEL, SomaBlocks
from pipeline.data.loading.cache import BATCH_ROWS, FORMAT
from pipeline.data.parallel import cluster_is_up, each_in_order
from scldm.errors import InputError

SHARD_ROWS = 8192  # four Census tiles: 43 MB on disk, 0.6 GB of memory for the process that writes it
BYTES_PER_COUNT = 3.0  # measured on Census-like counts: 2.75 with lz4 and uint16
SPARE_BYTES = 1 << 28  # free disk space that is left to others
ABANDONED_SECONDS = 3600.0  # a temporary file of this age was left by a killed process
POINTS = CommitPoints("cache.before_rename", "cache.before_record", "cache.after_record")


@dataclass(frozen=True)
class CacheInput:
    """Cells to cache, and what identifies them."""

    source: SomaBlocks  # all eligible cells; labels are not needed
    library_size: np.ndarray  # as ingest counted it, float32, one per id
    identity: Mapping[str, Any]  # what else decides the bytes: where the cells are from, their content; plain data
    mean_expressed: float  # genes with a count in a cell


@dataclass(frozen=True)
class WrittenCache:
    folder: Path
    n_written: int  # shards
    n_kept: int  # shards of an earlier run that were intact
    n_bytes: int


def cache_key(cells: CacheInput) -> str:
    """Return the first 16 hex digits of the hash of all that decides a cache's bytes."""
    reader = cells.source.reader
    content = {
        "format": FORMAT,
        "tile": cells.source.tile,
        "columns": [f"{f.name} {f.type}" for f in _cached_fields(reader.schema)],
        **reader.identity,
        "cells": _sha(cells.source.ids.astype(np.int64)),
        "library_size": _sha(cells.library_size.astype(np.float32)),
        **cells.identity,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def write_cache(
    cells: CacheInput, root: Path, *, on_shard: Callable[[int, int], Any] = lambda done, total: None
) -> WrittenCache:
    """Write the complete cache of some cells under `root`; shards that are there and intact are kept.

    Args:
        on_shard: Called after each shard with the number of finished cells and the number of all cells.

    Raises:
        InputError: the disk is too small, or SOMA does not hold what ingest counted.
    """
    folder = root / cache_key(cells)
    folder.mkdir(parents=True, exist_ok=True)
    store = ShardStore(folder, POINTS)
    store.remove_abandoned(older_than=ABANDONED_SECONDS)
    ids, ends = cells.source.ids, shard_ends(cells.source.ids, cells.source.tile)
    bounds = list(zip(np.r_[0, ends[:-1]], ends, strict=True))
    missing = sum(int(b - a) for k, (a, b) in enumerate(bounds) if _record(store, k) is None)
    _require_disk(folder, missing, cells.mean_expressed)
    parts = (_Part(k, str(folder), ids[a:b], cells.library_size[a:b]) for k, (a, b) in enumerate(bounds))
    reader = cells.source.reader
    without_ids = SomaBlocks(ids[:0], {}, cells.source.tile, reader)  # a part brings its own ids
    shards, n_written = [], 0
    for record, is_new in each_in_order(_shard, without_ids, parts, parallel=len(ends) > 1 and cluster_is_up()):
        shards.append({"file": record["file"], "n_cells": record["n_cells"], "bytes": record["bytes"]})
        n_written += is_new
        on_shard(sum(s["n_cells"] for s in shards), len(ids))
    n_bytes = sum(s["bytes"] for s in shards)
    manifest = {"format": FORMAT, "uri": reader.uri, **cells.identity, "n_cells": len(ids), "bytes": n_bytes}
    fault_point("cache.before_manifest")
    # Written last and renamed into place: a manifest means that the cache is complete.
    write_json_atomic(folder / MANIFEST, {**manifest, "shards": shards})
    return WrittenCache(folder, n_written, len(shards) - n_written, n_bytes)


def shard_ends(ids: np.ndarray, tile: int) -> np.ndarray:
    """Return the position in sorted ids after the last one of each shard.

    A shard holds whole tiles, up to the first tile edge past every SHARD_ROWS rows.
    """
    edges = np.r_[np.flatnonzero(np.diff(ids // tile)) + 1, len(ids)]
    number = (edges - 1) // SHARD_ROWS  # number of the shard that a tile's last cell would fall in
    return edges[np.r_[np.diff(number) != 0, True]]


# ---- one shard ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Part:
    """Cells of one shard."""

    number: int
    folder: str
    ids: np.ndarray
    library_size: np.ndarray


def _shard(without_ids: SomaBlocks, part: _Part) -> tuple[Record, bool]:
    """Return the record of a shard, and whether the shard had to be written; runs here or as a Ray task."""
    store = ShardStore(Path(part.folder), POINTS)
    record = _record(store, part.number)
    if record is not None and store.is_intact(record):
        return record, False
    table = _read(without_ids, part)

    def write(path: Path) -> dict[str, Any]:
        batches = write_shard_file(path, table)
        return {"n_cells": len(table), "bytes": path.stat().st_size, "batches": batches}

    try:
        name = f"{part.number:06d}-{{digest}}.arrow"
        return store.commit(name, write, record_name=_record_name(part.number)), True
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"ingest.cache: the disk of {store.folder} is full; {_MORE_SPACE}") from error


def _read(without_ids: SomaBlocks, part: _Part) -> pa.Table:
    codes = {name: np.zeros(len(part.ids), np.int32) for name in without_ids.reader.labels}
    table = SomaBlocks(part.ids, codes, without_ids.tile, without_ids.reader).read(part.ids)
    found = table["library_size"].to_numpy()
    if (wrong := np.flatnonzero(found != part.library_size)).size:
        i = int(wrong[0])
        raise InputError(
            f"{without_ids.reader.uri}: the counts of {wrong.size} of {len(part.ids)} cells do not add up to the "
            f"library size that ingest recorded (cell {part.ids[i]}: {found[i]:g}, not {part.library_size[i]:g}): they "
            "changed meanwhile, or raw_sum in obs is wrong"
        )
    return table.select([f.name for f in _cached_fields(table.schema)]).combine_chunks()


def write_shard_file(path: Path, table: pa.Table) -> list[tuple[int, int, int]]:
    """Write a shard; return offset, length and CRC-32 of each record batch (the first includes the file's head)."""
    spans, options = [], pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
        start = 0
        for row in range(0, len(table), BATCH_ROWS):
            writer.write_table(table.slice(row, BATCH_ROWS))
            spans.append((start, sink.tell() - start))
            start = sink.tell()
    with path.open("rb") as f:
        return [(offset, length, zlib.crc32(f.read(length))) for offset, length in spans]


def _record(store: ShardStore, number: int) -> Record | None:
    """Return the record of a shard whose file has the recorded size."""
    record = store.record(_record_name(number))
    return record if record is not None and store.has_size(record) else None


def _record_name(number: int) -> str:
    return f"{number:06d}.json"


# ---- disk --------------------------------------------------------------------------------------------------------
_MORE_SPACE = (
    "free some space, name a folder on a larger disk (ingest.cache=/large/disk/cache), or stream from SOMA "
    "(ingest.cache=null)"
)


def _require_disk(folder: Path, n_cells: int, mean_expressed: float) -> None:
    needed = round(n_cells * (32 + mean_expressed * BYTES_PER_COUNT))
    free = shutil.disk_usage(folder).free
    if n_cells and free < needed + SPARE_BYTES:
        raise InputError(
            f"ingest.cache: {n_cells:,} cells take about {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB "
            f"free, of which {SPARE_BYTES / 1e9:.1f} stay free; {_MORE_SPACE}"
        )


def _cached_fields(schema: pa.Schema) -> list[pa.Field]:
    return [f for f in schema if not f.name.startswith(LABEL)]


def _sha(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
