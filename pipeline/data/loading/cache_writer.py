"""Writes the cache: every eligible cell out of SOMA, once, into ragged shards that many epochs and jobs then read.

A cache's folder is named by a hash of what decides its bytes. Shards are named by their content, committed one by one
by rename, each with a record beside it; the manifest comes last. So a run that was killed goes on where it was, two
jobs at once do each other no harm, and a shard that lost its bytes is noticed and made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
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
from pipeline.data.loading.blocks import LABEL, SomaBlocks
from pipeline.data.loading.cache import BATCH_ROWS, record_path
from pipeline.data.parallel import cluster_is_up, each_in_order
from scldm.errors import InputError

FORMAT = 1
SHARD_ROWS = 8192  # four Census tiles: 43 MB as written, 0.6 GB for the process that makes it
BYTES_PER_COUNT = 3.0  # measured on Census-like counts: 2.75 with lz4 and uint16
SPARE_BYTES = 1 << 28  # of the disk, left to others
ABANDONED_SECONDS = 3600.0  # a temporary file as old as this is a killed run's


@dataclass(frozen=True)
class Cells:
    """What is to be cached, and what it is known by."""

    source: SomaBlocks  # all eligible cells; labels are not needed
    library_size: np.ndarray  # as ingest counted it, float32, beside the ids
    identity: Mapping[str, Any]  # what else decides the bytes: where from, content; plain data
    mean_expressed: float


@dataclass(frozen=True)
class Materialised:
    folder: Path
    made: int  # shards
    kept: int
    n_bytes: int


def cache_key(cells: Cells) -> str:
    """First 16 hex digits of the hash of all that decides a cache's bytes."""
    reader = cells.source.reader
    what = {
        "format": FORMAT,
        "measurement": reader.measurement,
        "layer": reader.layer,
        "tile": cells.source.tile,
        "columns": [f"{f.name} {f.type}" for f in _kept(reader.schema)],
        "genes": _sha(reader.gene_lut.astype(np.int32)),
        "cells": _sha(cells.source.ids.astype(np.int64)),
        "library_size": _sha(cells.library_size.astype(np.float32)),
        **cells.identity,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def materialise(
    cells: Cells, root: Path, *, on_shard: Callable[[int, int], Any] = lambda done, total: None
) -> Materialised:
    """The cache of some cells under `root`, whole; shards that are there and have their bytes are kept.

    Args:
        on_shard: Told the cells that are done, and of how many.

    Raises:
        InputError: if the disk is too small, or SOMA does not hold what ingest counted.
    """
    folder = root / cache_key(cells)
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    ids, ends = cells.source.ids, shard_ends(cells.source.ids, cells.source.tile)
    starts = np.r_[0, ends[:-1]]
    missing = sum(int(b - a) for k, (a, b) in enumerate(zip(starts, ends, strict=True)) if _record(folder, k) is None)
    _require_disk(folder, missing, cells.mean_expressed)
    parts = (
        _Part(k, str(folder), ids[a:b], cells.library_size[a:b])
        for k, (a, b) in enumerate(zip(starts, ends, strict=True))
    )
    reader = cells.source.reader
    bare = SomaBlocks(ids[:0], {}, cells.source.tile, reader)  # a part brings its own ids
    shards, made = [], 0
    for record, is_new in each_in_order(_shard, bare, parts, parallel=len(ends) > 1 and cluster_is_up()):
        shards.append({"file": record["file"], "n_cells": record["n_cells"], "bytes": record["bytes"]})
        made += is_new
        on_shard(sum(s["n_cells"] for s in shards), len(ids))
    n_bytes = sum(s["bytes"] for s in shards)
    what = {"format": FORMAT, "uri": reader.uri, **cells.identity, "n_cells": len(ids), "bytes": n_bytes}
    fault_point("cache.before_manifest")
    # Written last and renamed into place: a manifest means that the cache is whole.
    write_json_atomic(folder / MANIFEST, {**what, "shards": shards})
    return Materialised(folder, made, len(shards) - made, n_bytes)


def shard_ends(ids: np.ndarray, tile: int) -> np.ndarray:
    """Positions in sorted ids behind each shard: whole tiles, up to the first tile edge past every SHARD_ROWS rows."""
    edges = np.r_[np.flatnonzero(np.diff(ids // tile)) + 1, len(ids)]
    number = (edges - 1) // SHARD_ROWS  # of the shard that a tile's last cell would fall in
    return edges[np.r_[np.diff(number) != 0, True]]


# ---- one shard ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Part:
    number: int
    folder: str
    ids: np.ndarray
    library_size: np.ndarray


def _shard(bare: SomaBlocks, part: _Part) -> tuple[dict[str, Any], bool]:
    """The record of a shard, and whether it had to be made."""
    folder = Path(part.folder)
    record = _record(folder, part.number)
    if record is not None and _sha_of_file(folder / record["file"]) == record["sha256"]:
        return record, False
    table = _read(bare, part)
    tmp = folder / f".{part.number:06d}.{socket.gethostname()}.{os.getpid()}.tmp"
    try:
        batches = _write(tmp, table)
        sha = _sha_of_file(tmp)
        path = folder / f"{part.number:06d}-{sha[:12]}.arrow"
        record = {"file": path.name, "n_cells": len(table), "bytes": tmp.stat().st_size, "sha256": sha}
        fault_point("cache.before_rename")
        tmp.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"ingest.cache: the disk of {folder} is full; {_MORE_ROOM}") from error
    finally:
        tmp.unlink(missing_ok=True)
    fault_point("cache.before_record")
    write_json_atomic(record_path(path), {**record, "batches": batches})
    fault_point("cache.after_record")
    return record, True


def _read(bare: SomaBlocks, part: _Part) -> pa.Table:
    codes = {name: np.zeros(len(part.ids), np.int32) for name in bare.reader.labels}
    table = SomaBlocks(part.ids, codes, bare.tile, bare.reader).read(part.ids)
    found = table["library_size"].to_numpy()
    if (wrong := np.flatnonzero(found != part.library_size)).size:
        i = int(wrong[0])
        raise InputError(
            f"{bare.reader.uri}: the counts of {wrong.size} of {len(part.ids)} cells do not add up to what ingest took "
            f"them for (cell {part.ids[i]}: {found[i]:g}, not {part.library_size[i]:g}): they changed meanwhile, or "
            "raw_sum in obs is wrong"
        )
    return table.select([f.name for f in _kept(table.schema)]).combine_chunks()


def _write(path: Path, table: pa.Table) -> list[tuple[int, int, int]]:
    """Offset, length and crc32 of each record batch in the file; the first has the file's head with it."""
    spans, options = [], pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
        start = 0
        for row in range(0, len(table), BATCH_ROWS):
            writer.write_table(table.slice(row, BATCH_ROWS))
            spans.append((start, sink.tell() - start))
            start = sink.tell()
    with path.open("rb") as f:
        os.fsync(f.fileno())
        return [(offset, length, zlib.crc32(f.read(length))) for offset, length in spans]


def _record(folder: Path, number: int) -> dict[str, Any] | None:
    """What is written of a shard, if the shard is there at its size."""
    try:
        record = json.loads((folder / f"{number:06d}.json").read_text())
        whole = (folder / record["file"]).stat().st_size == record["bytes"]
    except (OSError, ValueError, KeyError):
        return None
    return record if whole else None


# ---- small things ------------------------------------------------------------------------------------------------
_MORE_ROOM = (
    "make room, name a folder on a larger disk (ingest.cache=/large/disk/cache), or stream from SOMA "
    "(ingest.cache=null)"
)


def _require_disk(folder: Path, n_cells: int, mean_expressed: float) -> None:
    needed = round(n_cells * (32 + mean_expressed * BYTES_PER_COUNT))
    free = shutil.disk_usage(folder).free
    if n_cells and free < needed + SPARE_BYTES:
        raise InputError(
            f"ingest.cache: {n_cells:,} cells take about {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB "
            f"free, of which {SPARE_BYTES / 1e9:.1f} stay free; {_MORE_ROOM}"
        )


def _sweep(folder: Path) -> None:
    """Away with what killed runs were writing."""
    for tmp in folder.glob(".*.tmp"):
        try:
            if time.time() - tmp.stat().st_mtime > ABANDONED_SECONDS:
                tmp.unlink()
        except FileNotFoundError:
            continue


def _kept(schema: pa.Schema) -> list[pa.Field]:
    return [f for f in schema if not f.name.startswith(LABEL)]


def _sha(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _sha_of_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
