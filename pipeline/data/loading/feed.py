"""From blocks to the steps of one training worker.

Convention: step s of every worker is global batch s of the order; a worker contributes q rows from each of its lanes,
in lane order, cut in micro-batches of equal number on all workers. Both engines give identical tables: "ray" reads with
a Ray Data execution of this worker's own, "local" in one thread of this process.
"""

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
    """What a worker gets for one optimizer step."""

    step: int
    epoch: int
    micro: list[pa.Table]  # columns of the source and `weight`
    real_cells: int  # of the global batch, over all workers


@dataclass(frozen=True)
class _Round:
    """Steps [start, stop) of one round, on this worker's lanes."""

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
    """Steps [start_step, stop_step) of a worker.

    Args:
        order: Over `source.ids`.
        engine: "ray" needs a Ray cluster; "local" is for torchrun and tests.
        read_cpus: CPU slots that a read takes from the cluster ("ray" only). 0: more would wait for ever where the
            training workers hold every slot.
    """
    if order.ids is not source.ids and not np.array_equal(order.ids, source.ids):
        raise ValueError("the order was not made from the ids of this source")
    lanes = order.lanes_of(rank, world_size)
    rounds = _rounds(order, lanes, start_step, stop_step)
    return _steps(source, order, rounds, micro_batch_size, engine, read_cpus)


def _rounds(order: FeedOrder, lanes: Sequence[int], start: int, stop: int) -> Iterator[_Round]:
    """The rounds that hold steps [start, stop); the first and last are cut to them."""
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
    """Cut in the fewest parts of at most `micro_batch_size` rows, as even as can be."""
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
    """Read in one thread, `ahead` blocks before they are asked for: with one per lane, a round is read while the round
    before it is consumed."""
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        coming: deque[Future[pa.Table]] = deque()
        try:
            for ids in blocks:
                coming.append(pool.submit(source.read, ids))
                if len(coming) > ahead:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()
