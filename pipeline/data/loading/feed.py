"""The data loader: from a source of blocks to the steps of one training worker; `feed` describes it step by step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.data.loading.blocks import BlockSource
from pipeline.data.loading.collate import LatentBatch, to_cell_batch, to_latent_batch
from pipeline.data.loading.order import FeedOrder
from scldm.errors import InputError

__all__ = ["FeedStep", "LatentBatch", "feed", "to_cell_batch", "to_latent_batch"]

BLOCKS_PER_DATASET = 1000  # one Ray Data execution covers many epochs, so that epochs do not stall


@dataclass(frozen=True)
class FeedStep:
    """The cells of one worker for one optimizer step."""

    step: int
    epoch: int
    micro: list[pa.Table]  # micro-batches: columns of the source and `weight`
    real_cells: int  # cells of weight 1 in the global batch, over all workers


@dataclass(frozen=True)
class _Round:
    """Steps [start, stop) of one round, on the lanes of this worker."""

    epoch: int
    start: int
    stop: int
    blocks: list[np.ndarray]  # ids, per lane
    weights: list[np.ndarray]


def feed(
    source: BlockSource,
    order: FeedOrder,
    *,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int,
    micro_batch_size: int,
    engine: Literal["ray", "local"],
    read_cpus: float = 0.0,
) -> Iterator[FeedStep]:
    """Yield steps [start_step, stop_step) of a worker.

    A cell takes these steps from the store to the device:

    1. `source.ids` lists the eligible cells, sorted. `FeedOrder` cuts them into chunks on the grid of storage tiles,
       so that a read covers whole tiles: reading one row of SOMA costs as much as reading its tile.
    2. Each epoch permutes the chunks, cuts them into rounds, and each round into one block of ids per lane. Lanes are
       parallel streams of blocks: a worker reads some of them, and every global batch takes the same number of rows
       from each. All of this is a function of (seed, epoch), so any step can be computed without those before it.
    3. Each block of ids becomes one table: `source.read(ids)` reads the counts from SOMA (`SomaBlocks`), from a cache
       on disk (`CacheBlocks`), or latents (`IpcBlocks`). The next round is read while this one is consumed: by a Ray
       Data execution of this worker (engine "ray") or in a thread of this process ("local"), with identical tables.
    4. Step s takes q = batch_size / lanes rows from the table of each lane of this worker, in lane order: its share of
       global batch s. A column `weight` is 0 for the repeats that fill the last batch of an epoch, else 1.
    5. The share is cut into micro-batches, as many on every worker, of at most `micro_batch_size` cells.
    6. `to_cell_batch` (or `to_latent_batch`) turns a micro-batch into tensors, and `.to(device)` copies them; padding
       happens on the device (`collate.padded`).

    Args:
        source: Cells and how to read them, for example `IngestedDataset.blocks("train")`.
        order: Order over `source.ids`.
        engine: "ray" needs a Ray cluster; "local" is for torchrun and tests.
        read_cpus: CPU slots that a read takes from the cluster ("ray" only). Above 0, reads wait forever if training
            workers hold every slot.

    Example:
        A synthetic experiment of 100 cells and 20 genes, in storage tiles of 16:

        >>> import tempfile
        >>> from pathlib import Path
        >>> from pipeline.config.ingest import SyntheticSource
        >>> from pipeline.data.loading.blocks import SomaBlocks, SomaReader
        >>> from pipeline.data.soma.write import write_experiment
        >>> from pipeline.data.sources.synthetic import synthetic_cells
        >>> cells = synthetic_cells(SyntheticSource(type="synthetic", n_cells=100, n_genes=20, n_types=2))
        >>> folder = Path(tempfile.mkdtemp()) / "soma"
        >>> store = write_experiment(folder, cells.obs, cells.var, cells.chunks(), tile=16)
        >>> genes = np.arange(20, dtype=np.int32)  # every gene keeps its number
        >>> reader = SomaReader(store.uri, {}, "RNA", "raw", genes, labels=("cell_type",), count_type="uint16")
        >>> types = cells.obs["cell_type"].cat.codes.to_numpy(np.int32)
        >>> source = SomaBlocks(np.arange(100), {"cell_type": types}, tile=16, reader=reader)

        One epoch in global batches of 24, on one worker, in micro-batches of 12:

        >>> order = FeedOrder(source.ids, source.tile, seed=0, batch_size=24, lanes=2, block_rows=24)
        >>> steps = feed(source, order, rank=0, world_size=1, start_step=0, stop_step=order.n_steps_per_epoch,
        ...              micro_batch_size=12, engine="local")
        >>> [(step.step, [len(table) for table in step.micro], step.real_cells) for step in steps]
        [(0, [12, 12], 24), (1, [12, 12], 24), (2, [12, 12], 24), (3, [12, 12], 24), (4, [12, 12], 4)]

        The same step again, as tensors; nothing before it is read:

        >>> step = next(feed(source, order, rank=0, world_size=1, start_step=3, stop_step=4, micro_batch_size=12,
        ...                  engine="local"))
        >>> batch = to_cell_batch(step.micro[0], ["cell_type"]).to("cpu")
        >>> tuple(batch.dense(20).shape), bool((batch.dense(20).sum(1) == batch.library_size).all())
        ((12, 20), True)
    """
    if order.ids is not source.ids and not np.array_equal(order.ids, source.ids):
        raise ValueError("the order was not made from the ids of this source")
    lanes = order.lanes_of(rank, world_size)
    rounds = _rounds(order, lanes, start_step, stop_step)
    return _steps(source, order, rounds, micro_batch_size, engine, read_cpus)


def _rounds(order: FeedOrder, lanes: Sequence[int], start: int, stop: int) -> Iterator[_Round]:
    """Yield the rounds that hold steps [start, stop); the first and last are cut to them."""
    q = order.rows_per_lane
    while start < stop:
        at = order.locate(start)
        n = min(stop - start, order.steps_in_round(at.round) - at.batch)
        rows = slice(at.batch * q, (at.batch + n) * q)
        found = [order.block(at.epoch, at.round, lane) for lane in lanes]
        yield _Round(at.epoch, start, start + n, [ids[rows] for ids, _ in found], [w[rows] for _, w in found])
        start += n


def _steps(
    source: BlockSource,
    order: FeedOrder,
    rounds: Iterator[_Round],
    micro_batch_size: int,
    engine: str,
    read_cpus: float,
) -> Iterator[FeedStep]:
    q = order.rows_per_lane
    for segment in _segments(rounds):
        blocks = [ids for r in segment for ids in r.blocks]
        if engine == "ray":
            tables = _read_with_ray(source, blocks, read_cpus)
        else:
            tables = _read_here(source, blocks, ahead=len(segment[0].blocks))
        for r in segment:
            held = [_weighted(next(tables), w) for w in r.weights]
            for k in range(r.stop - r.start):
                rows = pa.concat_tables([lane.slice(k * q, q) for lane in held])
                step = r.start + k
                yield FeedStep(step, r.epoch, _micro(rows, micro_batch_size), order.real_cells(step))
            del held  # before the next round's blocks come in


def _segments(rounds: Iterator[_Round]) -> Iterator[list[_Round]]:
    held: list[_Round] = []
    for r in rounds:
        held.append(r)
        if sum(len(x.blocks) for x in held) >= BLOCKS_PER_DATASET:
            yield held
            held = []
    if held:
        yield held


def _weighted(table: pa.Table, weights: np.ndarray) -> pa.Table:
    if len(table) != len(weights):
        raise AssertionError(f"a block came back with {len(table)} rows instead of {len(weights)}")
    return table.append_column("weight", pa.array(weights, pa.float32()))


def _micro(rows: pa.Table, micro_batch_size: int) -> list[pa.Table]:
    """Cut into the fewest parts of at most `micro_batch_size` rows, as even as possible."""
    n = -(-len(rows) // micro_batch_size)
    cuts = len(rows) * np.arange(n + 1) // n
    return [rows.slice(int(a), int(b - a)).combine_chunks() for a, b in pairwise(cuts)]


def _read_with_ray(source: BlockSource, blocks: Sequence[np.ndarray], read_cpus: float) -> Iterator[pa.Table]:
    try:
        from pipeline.data.loading.ray_source import iterate_blocks
    except ImportError as error:
        raise InputError('engine "ray" needs the package ray[data]') from error
    return iterate_blocks(source, blocks, read_cpus=read_cpus)


def _read_here(source: BlockSource, blocks: Sequence[np.ndarray], *, ahead: int) -> Iterator[pa.Table]:
    """Read in one thread, `ahead` blocks in advance.

    With one block per lane, a round is read while the round before it is consumed.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        pending: deque[Future[pa.Table]] = deque()
        try:
            for ids in blocks:
                pending.append(pool.submit(source.read, ids))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
