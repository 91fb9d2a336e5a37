"""Control cells that the cells of a flow's training start at, in the place of noise.

Cells are matched to control cells within a *round* of a lane (`FeedOrder`): up to `block_rows` cells, so that many
cells of each combination of labels are matched together however few of them are in a step. Which cells start at a
control cell, and at which, is a function of (seed, epoch, round, lane) and therefore the same for any number of
workers, any micro batch, and after a restart. Validation cells are matched all together: a function of the seed and of
these cells.

Shape letters: b cells, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.config.train import FlowStartConfig
from pipeline.data.loading.blocks import LABEL, IpcBlocks
from pipeline.data.loading.collate import to_latent_batch
from pipeline.data.loading.order import FeedOrder
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.flow.config import ControlStart
from scldm.flow.transport import NOT_A_CONTROL, ControlCells
from scldm.random import generator

POOL, START, HELD = 31, 32, 33  # streams of randomness: control cells, training cells, validation cells
SCANNED = 2**20  # rows of the latent cache whose labels are read at a time


def read_controls(
    source: IpcBlocks, config: FlowStartConfig, vocabulary: Vocabulary, *, shape: tuple[int, int], seed: int
) -> ControlCells:
    """Read the latents of control cells from the latent cache.

    Args:
        source: Cells of the training split.
        shape: (m, e).

    Raises:
        UnknownNameError: The data have no such label or class.
        InputError: No cell has the class.
    """
    [(label, control)] = config.control.items()
    names = [x.name for x in vocabulary.labels]
    [wanted] = vocabulary.label(label).encode([control]).tolist()
    rows, codes = _rows_of(source, label, wanted, names)
    if not len(rows):
        raise InputError(
            f"train_flow.start.control: no cell of the latent cache {source.folder} has {label} {control!r}"
        )
    others = [codes[name] for name in names if name != label]
    kept: list[np.ndarray] = []
    groups, group_of = np.unique(np.stack(others, 1), axis=0, return_inverse=True) if others else (None, None)
    for i in range(1 if groups is None else len(groups)):
        own = rows if group_of is None else rows[group_of.ravel() == i]
        if len(own) > config.cells_per_group:
            key = () if groups is None else tuple(int(x) for x in groups[i])
            drawn = torch.randperm(len(own), generator=generator(seed, POOL, *key))[: config.cells_per_group]
            own = np.sort(own[drawn.numpy()])
        kept.append(own)
    batch = to_latent_batch(source.read(np.concatenate(kept)), names, shape=shape)
    return ControlCells.of(batch.latents, batch.conditions, label)


def of_vocabulary(start: ControlStart, vocabulary: Vocabulary) -> ControlStart:
    """Return a start with the control class as the data call it: 1.0 is the class 1."""
    label = vocabulary.label(start.label)
    return start.model_copy(update={"control": label.classes[int(label.encode([start.control])[0])]})


def _rows_of(
    source: IpcBlocks, label: str, wanted: int, names: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the rows of a class, ascending, and the class ids of their labels."""
    shards = source.reader.shards
    fields = [shards.schema.field(LABEL + name) for name in names]
    rows: list[np.ndarray] = [np.zeros(0, np.int64)]
    codes: dict[str, list[np.ndarray]] = {name: [np.zeros(0, np.int64)] for name in names}
    for start in range(0, len(source.ids), SCANNED):
        part = source.ids[start : start + SCANNED]
        columns = dict(zip(names, (x.to_numpy().astype(np.int64) for x in shards.read(part, fields)), strict=True))
        of_class = columns[label] == wanted
        rows.append(part[of_class])
        for name, values in columns.items():
            codes[name].append(values[of_class])
    return np.concatenate(rows), {name: np.concatenate(parts) for name, parts in codes.items()}


class ControlStarts:
    """Draws which cells start at a control cell, and at which.

    Args:
        cells: The control cells.
        source: Training cells.
        order: Their order.
        lanes: This worker's lanes of it.
        share: Share of the cells that start at a control cell.
    """

    def __init__(
        self, cells: ControlCells, source: IpcBlocks, order: FeedOrder, lanes: Sequence[int], *, share: float, seed: int
    ):
        self.cells, self.source, self.order, self.lanes = cells, source, order, list(lanes)
        self.share, self.seed = share, seed
        self._round: tuple[tuple[int, int], list[Tensor]] | None = None  # the last round, and each lane's starts in it

    def for_step(self, step: int) -> Tensor:
        """Return the control cell of this worker's rows of a step, lane after lane; -1 for noise. (b,) int64."""
        at, q = self.order.locate(step), self.order.rows_per_lane
        if self._round is None or self._round[0] != (at.epoch, at.round):
            self._round = (at.epoch, at.round), [self._lane(at.epoch, at.round, lane) for lane in self.lanes]
        return torch.cat([starts[at.batch * q : (at.batch + 1) * q] for starts in self._round[1]])

    def for_validation(self, joinids: Tensor, latents: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the control cell that each validation cell starts at, -1 for noise. All of them at once."""
        order = joinids.argsort()  # so that the draws do not depend on batches
        g = generator(self.seed, HELD)
        chosen = torch.rand(len(order), generator=g) < self.share
        found = self.cells.match(latents[order], {k: v[order] for k, v in conditions.items()}, chosen, g)
        starts = torch.full_like(found, NOT_A_CONTROL)
        starts[order] = found
        return starts

    def start_at(self, noise: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return x0 (b, m, e), noise or a control cell's latents, and which cells start at a control cell (b,)."""
        from_control = starts != NOT_A_CONTROL
        x0 = torch.where(from_control.view(-1, 1, 1), self.cells.latents[starts.clamp(min=0)], noise)
        return x0, from_control

    def _lane(self, epoch: int, round_: int, lane: int) -> Tensor:
        ids, _ = self.order.block(epoch, round_, lane)
        table: pa.Table = self.source.read(ids)
        batch = to_latent_batch(table, [self.cells.label, *self.cells.others], shape=_shape(self.cells.latents))
        g = generator(self.seed, START, epoch, round_, lane)
        chosen = torch.rand(len(ids), generator=g) < self.share
        return self.cells.match(batch.latents, batch.conditions, chosen, g)


def _shape(latents: Tensor) -> tuple[int, int]:
    return latents.shape[1], latents.shape[2]
