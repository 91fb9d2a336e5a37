"""Blocks of cells through Ray Data: one read task per block, one block per task, in the order given.

The order is ours, not Ray's (`order.py`), so nothing is shuffled, cut or merged here: `preserve_order`, as many output
blocks as tasks, no block-size limit. A failed read is tried again; the same ids give the same table.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from pipeline.data.loading.blocks import BlockSource, NoRoom

READ_CPUS = 0.0  # CPU slots of a read: on a machine whose slots are all held by training workers, reads must go on
READS_AT_ONCE = 2  # per dataset; bounds reads where slots do not. A block is ~100 MB at Census scale
RETRIED = ["S3", "timed out", "timeout", "Connection", "SlowDown", "TileDBError", "curl"]


def _read_block(reader: ray.ObjectRef, rows: Any) -> list[pa.Table]:
    return [ray.get(reader).read(rows)]


class BlocksDatasource(Datasource):
    """Blocks of a source, given by the ids of their rows."""

    def __init__(self, source: BlockSource, blocks: Sequence[np.ndarray]) -> None:
        super().__init__()
        self._n_bytes = sum(map(len, blocks)) * source.reader.row_bytes
        reader = ray.put(source.reader)  # once, not in every task
        self._tasks = [self._task(source, reader, ids) for ids in blocks]

    @staticmethod
    def _task(source: BlockSource, reader: ray.ObjectRef, ids: np.ndarray) -> tuple[Any, BlockMetadata, pa.Schema]:
        read = functools.partial(_read_block, reader, source.rows(ids))
        read.__name__ = "read_block"  # type: ignore[attr-defined]  # Ray's planner reads it
        size = len(ids) * source.reader.row_bytes
        metadata = BlockMetadata(num_rows=len(ids), size_bytes=size, exec_stats=None, input_files=None)
        return read, metadata, source.reader.schema

    def get_name(self) -> str:
        return "Cells"

    def estimate_inmemory_data_size(self) -> int:
        return self._n_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        # Called twice or more for one execution: must be pure.
        return [
            ReadTask(read, metadata, schema=schema, per_task_row_limit=per_task_row_limit)
            for read, metadata, schema in self._tasks
        ]


def blocks_dataset(
    source: BlockSource, blocks: Sequence[np.ndarray], *, read_cpus: float = READ_CPUS, concurrency: int = READS_AT_ONCE
) -> ray.data.Dataset:
    """A dataset with one block per array of ids, in that order.

    Args:
        read_cpus: CPU slots that a read takes.
        concurrency: Most reads at once.
    """
    if not blocks:
        raise ValueError("no blocks to read")
    with DataContext.current(_context()):
        return ray.data.read_datasource(
            BlocksDatasource(source, blocks),
            override_num_blocks=len(blocks),  # another number makes Ray cut every block in pieces
            num_cpus=read_cpus,
            concurrency=concurrency,
        )


def storage_blocks(source: BlockSource, block_rows: int) -> list[np.ndarray]:
    """All ids of a source in storage order, cut near every `block_rows` at storage tiles."""
    tiles = max(1, block_rows // source.tile)
    group = source.ids // (source.tile * tiles)
    return np.split(source.ids, np.flatnonzero(np.diff(group)) + 1)


def iterate_blocks(source: BlockSource, blocks: Sequence[np.ndarray], *, read_cpus: float) -> Iterator[pa.Table]:
    """Tables of the blocks in order; read ahead by Ray as far as its object store allows."""
    with room_is_explained(source, blocks):
        dataset = blocks_dataset(source, blocks, read_cpus=read_cpus)
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


@contextmanager
def room_is_explained(source: BlockSource, blocks: Sequence[np.ndarray]) -> Iterator[None]:
    """Ray's error for want of room inside becomes one that says what a block takes and what mends it.

    Raises:
        NoRoom: from Ray's error.
    """
    try:
        yield
    except (OutOfDiskError, ObjectStoreFullError) as error:
        rows = max(map(len, blocks))
        remedies = []
        if rows // 2 >= source.tile:
            smaller = f"set train.feed.block_rows={rows // 2}"
            remedies.append(f"{smaller}, which changes the order of the cells and so begins a new run")
        remedies += [
            "use fewer workers (resources.workers)",
            "a cluster whose nodes have more room (ray start --object-store-memory=BYTES "
            "--object-spilling-directory=FOLDER, then RAY_ADDRESS)",
        ]
        size = rows * source.reader.row_bytes / 1e6
        raise NoRoom(
            f"a block of cells, up to {rows} of them or {size:.1f} MB, finds no room in Ray's object store nor on the "
            f"disk behind it, and each worker has several on the way; {', or '.join(remedies)}"
        ) from error


def _context() -> DataContext:
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = None  # what a task returns stays one block, however large
    context.retried_map_errors = RETRIED
    context.max_map_retries = 3
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context
