"""The order in which cells are seen: a pure function of (seed, epoch), for any number of workers.

The ids of the n eligible cells are cut into *chunks* on the storage tile grid. An epoch permutes the chunks and
concatenates them. *Lanes* are parallel streams of blocks: a *round* takes `lanes * block_rows` rows of the epoch and
cuts them into one *block* per lane; the last round takes what is left. The rows of a block are permuted. Global batch
k of a round is rows [k q, (k + 1) q) of every lane, with q = batch_size / lanes. Worker r of W reads lanes r, r + W, …,
so the sequence of global batches never depends on W. The last batch of an epoch is filled with repeats of weight 0;
every cell has weight 1 exactly once per epoch.

Mixing. With L lanes of K chunks a block, a batch of G cells is G / L random rows of each of L blocks, which hold a
simple random sample of L K of all chunks. So for a label of frequency p with correlation rho <= 1 inside a chunk,
Var(its share of a batch) <= p (1 - p) [1 / G + rho / (L K)]: at most 1 + rho G / (L K) times that of a random order,
on any number of workers. `tests/unit/data/loading/test_mixing.py` holds it, on cells sorted by label (rho = 1).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from scldm.errors import InputError

EPOCHS_KEPT = 2


@dataclass(frozen=True)
class Position:
    """Place of a global batch."""

    epoch: int
    round: int
    batch: int  # number in the round


@dataclass(frozen=True)
class FeedOrder:
    """The sequence of global batches over `ids`; it follows from these fields alone."""

    ids: np.ndarray  # sorted, unique, int64
    tile: int  # rows of a storage tile
    seed: int
    batch_size: int
    lanes: int  # parallel streams of blocks; a multiple of the number of workers
    block_rows: int
    _epochs: OrderedDict = field(default_factory=OrderedDict, repr=False, compare=False)

    def __post_init__(self) -> None:
        problems = []
        if not len(self.ids):
            problems.append("there are no cells to feed; widen ingest.obs_filter or give this split a share > 0")
        if len(self.ids) and (np.diff(self.ids) <= 0).any():
            raise ValueError("ids must be sorted and unique")
        if self.batch_size % self.lanes:
            near = max(self.lanes, round(self.batch_size / self.lanes) * self.lanes)
            problems.append(
                f"feed.batch_size ({self.batch_size}) must be a multiple of feed.lanes ({self.lanes}); "
                f"set feed.batch_size to {near} or feed.lanes to a divisor of {self.batch_size}"
            )
        if problems:
            raise InputError("\n".join(problems))

    # ---- sizes ---------------------------------------------------------------------------------------------------
    @property
    def n_cells(self) -> int:
        return len(self.ids)

    @property
    def rows_per_lane(self) -> int:
        """Return q, the number of rows that a lane contributes to every global batch."""
        return self.batch_size // self.lanes

    @property
    def steps_per_round(self) -> int:
        return max(1, self.block_rows // self.rows_per_lane)

    @property
    def n_steps_per_epoch(self) -> int:
        return -(-self.n_cells // self.batch_size)

    @property
    def n_rounds(self) -> int:
        return -(-self.n_steps_per_epoch // self.steps_per_round)

    def lanes_of(self, rank: int, world_size: int) -> list[int]:
        """Return the lanes that a worker reads."""
        if self.lanes % world_size:
            raise InputError(
                f"feed.lanes ({self.lanes}) must be a multiple of the number of workers ({world_size}), so that each "
                f"worker reads the same number of lanes; set feed.lanes to {-(-self.lanes // world_size) * world_size} "
                f"or resources.workers to a divisor of {self.lanes}"
            )
        return list(range(rank, self.lanes, world_size))

    # ---- position ------------------------------------------------------------------------------------------------
    def locate(self, step: int) -> Position:
        """Return the place of the global batch of a step; steps count from 0 over all epochs."""
        epoch, k = divmod(step, self.n_steps_per_epoch)
        round_, batch = divmod(k, self.steps_per_round)
        return Position(epoch, round_, batch)

    def steps_in_round(self, round_: int) -> int:
        return min(self.steps_per_round, self.n_steps_per_epoch - round_ * self.steps_per_round)

    def real_cells(self, step: int) -> int:
        """Return the number of cells of weight 1 in a global batch."""
        k = step % self.n_steps_per_epoch
        return min(self.batch_size, self.n_cells - k * self.batch_size)

    # ---- rows ----------------------------------------------------------------------------------------------------
    def block(self, epoch: int, round_: int, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and weights (float32) of a lane's rows in a round, in the order in which they are seen.

        A full round gives each lane the same number of rows. In the last round the remaining rows are distributed
        evenly, and each lane is filled up with repeats of its own rows, which fall into the last batch.
        """
        start = round_ * self.steps_per_round * self.batch_size
        stop = min(start + self.steps_per_round * self.batch_size, self.n_cells)
        cuts = start + (stop - start) * np.arange(self.lanes + 1) // self.lanes
        rows = self._rows(epoch, int(cuts[lane]), int(cuts[lane + 1]))
        rows = self._rng(epoch, round_ + 1, lane + 1).permutation(rows)
        n = self.steps_in_round(round_) * self.rows_per_lane
        weights = np.zeros(n, np.float32)
        weights[: len(rows)] = 1
        if len(rows) < n:
            repeat = rows if len(rows) else self._rows(epoch, start, start + 1)
            rows = np.concatenate([rows, np.resize(repeat, n - len(rows))])
        return rows, weights

    def _rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return ids at positions [start, stop) of an epoch's concatenated chunks, without concatenating them."""
        chunks, ends = self._epoch(epoch)
        first, last = np.searchsorted(ends, [start, max(start, stop - 1)], side="right")
        parts = []
        for i in range(first, last + 1):
            lo, hi = self._chunks[chunks[i]]
            offset = ends[i] - (hi - lo)
            parts.append(self.ids[lo + max(0, start - offset) : lo + max(0, min(hi - lo, stop - offset))])
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the chunks in the order of an epoch, and the position after each."""
        if epoch not in self._epochs:
            order = self._rng(epoch, 0, 0).permutation(len(self._chunks))
            sizes = np.diff(self._chunks, axis=1)[:, 0]
            self._epochs[epoch] = (order, np.cumsum(sizes[order]))
            while len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    @cached_property
    def _chunks(self) -> np.ndarray:
        """Start and stop in `ids` of the cells of each storage tile, (n_chunks, 2)."""
        edges = np.flatnonzero(np.diff(self.ids // self.tile)) + 1
        return np.stack([np.r_[0, edges], np.r_[edges, self.n_cells]], axis=1)

    def _rng(self, epoch: int, *stream: int) -> np.random.Generator:
        """Return a counter-based generator: the high words of the counter name the stream, so streams never overlap."""
        counter = np.array([0, 0, *reversed(stream)], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, epoch], np.uint64), counter=counter))
