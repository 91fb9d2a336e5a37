"""Reads blocks of cells with Ray Data: one read task per block, one block per task, in the given order.

The order comes from `order.py`, not from Ray, so nothing is shuffled, cut or merged here: `preserve_order`, as many
output blocks as tasks, no block-size limit. A failed read is tried again; the same ids give the same table.
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

READ_CPUS = 0.0  # CPU slots of a read: reads must proceed on a machine whose slots are all held by training workers
PARALLEL_READS = 2  # per dataset; limits reads that take no slots. A block is ~100 MB at Census scale
RETRIED = ["S3", "timed out", "timeout", "Connection", "SlowDown", "TileDBError", "curl"]


def _read_block(reader: ray.ObjectRef, rows: Any) -> list[pa.Table]:
    return [ray.get(reader).read(rows)]


class BlocksDatasource(Datasource):
    """Reads blocks of a source, each given by the ids of its rows."""

    def __init__(self, source: BlockSource, blocks: Sequence[np.ndarray]) -> None:
        super().__init__()
        self._n_bytes = sum(map(len, blocks)) * source.reader.row_bytes
        reader = ray.put(source.reader)  # stored once, not in every task
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
        # Ray calls this more than once per execution, so it must be pure.
        return [
            ReadTask(read, metadata, schema=schema, per_task_row_limit=per_task_row_limit)
            for read, metadata, schema in self._tasks
        ]


def blocks_dataset(
    source: BlockSource,
    blocks: Sequence[np.ndarray],
    *,
    read_cpus: float = READ_CPUS,
    concurrency: int = PARALLEL_READS,
) -> ray.data.Dataset:
    """Return a dataset with one block per array of ids, in that order.

    Args:
        read_cpus: CPU slots that a read takes.
        concurrency: Maximum number of simultaneous reads.
    """
    if not blocks:
        raise ValueError("no blocks to read")
    with DataContext.current(_context()):
        return ray.data.read_datasource(
            BlocksDatasource(source, blocks),
            override_num_blocks=len(blocks),  # with another number Ray cuts every block
            num_cpus=read_cpus,
            concurrency=concurrency,
        )


def iterate_blocks(source: BlockSource, blocks: Sequence[np.ndarray], *, read_cpus: float) -> Iterator[pa.Table]:
    """Yield the tables of blocks in order; Ray reads ahead as far as its object store allows."""
    with explain_full_store(source, blocks):
        dataset = blocks_dataset(source, blocks, read_cpus=read_cpus)
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


@contextmanager
def explain_full_store(source: BlockSource, blocks: Sequence[np.ndarray]) -> Iterator[None]:
    """Replace Ray's error about a full object store by one that names the size of a block and the remedies.

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
            remedies.append(f"{smaller}, which changes the order of the cells and so starts a new run")
        remedies += [
            "use fewer workers (resources.workers)",
            "use a cluster whose nodes have more memory and disk (ray start --object-store-memory=BYTES "
            "--object-spilling-directory=FOLDER, then RAY_ADDRESS)",
        ]
        size = rows * source.reader.row_bytes / 1e6
        raise NoRoom(
            f"a block of up to {rows} cells ({size:.1f} MB) fits neither into Ray's object store nor on the disk "
            f"behind it, and each worker reads several at a time; {', or '.join(remedies)}"
        ) from error


def _context() -> DataContext:
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = None  # the output of a task stays one block, however large
    context.retried_map_errors = RETRIED
    context.max_map_retries = 3
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context
