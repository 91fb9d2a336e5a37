"""Trains the flow: flow matching on cached latents.

Noise, times and dropped labels are drawn for each lane of the order by (seed, step, lane), a row for each of its cells.
Which cell is in a row follows from (seed, step) alone, so the draws are a function of (seed, step, cell): they differ
between workers, and a cell gets the same ones with any number of workers. Validation draws for each cell by (seed,
cell): the same in every validation and in every run with the seed, whatever the batch size. Control cells, at which a
flow may start in the place of noise, are `ControlStarts`'s.

Shape letters: b cells, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.data.loading.collate import to_latent_batch
from pipeline.data.loading.order import FeedOrder
from pipeline.training.objectives.base import MicroBatchIndex, map_tensors
from pipeline.training.objectives.vae import NOISE, VALIDATION
from scldm.flow.config import PathConfig
from scldm.flow.objective import flow_loss
from scldm.flow.path import sample_path, training_interval
from scldm.nn.dit import DiT, drop_labels
from scldm.random import generator

if TYPE_CHECKING:
    from pipeline.training.objectives.controls import ControlStarts
    from pipeline.training.objectives.samples import FlowSamples


@dataclass(frozen=True)
class Draws:
    """The random numbers of b cells."""

    x0: Tensor  # (b, m, e): noise, or the latents of a control cell
    t: Tensor  # (b,), uniform in [0, 1)
    coins: Tensor  # (b, 1 + labels), uniform: which labels are dropped
    from_control: Tensor | None = None  # (b,) bool: which x0 are of control cells; None: none, and the flow has none

    def rows(self, start: int, n: int) -> Draws:
        """Return the draws of n rows from `start` on."""
        at = slice(start, start + n)
        starts = None if self.from_control is None else self.from_control[at]
        return Draws(self.x0[at], self.t[at], self.coins[at], starts)


class FlowDraws:
    """Draws random numbers for this worker's rows of a step, and for validation cells.

    Args:
        lanes: This worker's lanes of the order.
        latent_shape: (m, e).
        controls: Control cells that cells may start at; None: all start at noise.
    """

    def __init__(
        self,
        seed: int,
        order: FeedOrder,
        lanes: Sequence[int],
        *,
        latent_shape: tuple[int, int],
        n_labels: int,
        controls: ControlStarts | None = None,
    ):
        self.seed, self.lanes, self.rows_per_lane = seed, lanes, order.rows_per_lane
        self.shape, self.n_labels, self.controls = latent_shape, n_labels, controls
        self._cached: tuple[int, Draws] | None = None  # by step

    def for_micro_batch(self, index: MicroBatchIndex, n: int) -> Draws:
        """Draw for a micro batch of n cells."""
        if self._cached is None or self._cached[0] != index.step:  # drawn once for all micro batches of the step
            lanes = [self._draw(self.rows_per_lane, NOISE, index.step, lane) for lane in self.lanes]
            drawn = _concatenate(lanes)
            if self.controls is not None:
                drawn = self._started(drawn, self.controls.for_step(index.step))
            self._cached = (index.step, drawn)
        return self._cached[1].rows(index.start, n)

    def started(self, batches: Sequence[FlowBatch]) -> list[FlowBatch]:
        """Return all validation cells with the control cells that some of them start at."""
        if self.controls is None or not batches:
            return list(batches)
        joinids, latents = (torch.cat([getattr(x, f) for x in batches]) for f in ("joinids", "latents"))
        conditions = {k: torch.cat([x.conditions[k] for x in batches]) for k in batches[0].conditions}
        starts = self.controls.for_validation(joinids, latents, conditions).split([len(x.joinids) for x in batches])
        return [replace(x, draws=self._started(x.draws, own)) for x, own in zip(batches, starts, strict=True)]

    def _started(self, draws: Draws, starts: Tensor) -> Draws:
        assert self.controls is not None
        x0, from_control = self.controls.start_at(draws.x0, starts)
        return replace(draws, x0=x0, from_control=from_control)

    def for_validation(self, joinids: Tensor) -> Draws:
        """Draw for validation cells, by their ids: they start at noise."""
        return _concatenate([self._draw(1, VALIDATION, i) for i in joinids.tolist()])

    def _draw(self, n: int, *key: int) -> Draws:
        g = generator(self.seed, *key)
        noise = torch.randn(n, *self.shape, generator=g)
        return Draws(noise, torch.rand(n, generator=g), torch.rand(n, 1 + self.n_labels, generator=g))


def _concatenate(draws: Sequence[Draws]) -> Draws:
    return Draws(*(torch.cat([getattr(d, f) for d in draws]) for f in ("x0", "t", "coins")))


@dataclass(frozen=True)
class FlowBatch:
    """Latents of b cells with their random numbers."""

    latents: Tensor  # (b, m, e)
    conditions: Mapping[str, Tensor]
    draws: Draws
    joinids: Tensor
    weight: Tensor


class FlowObjective:
    """Flow-matching loss on cached latents.

    Args:
        draws: Draws noise, times and dropped labels.
        label_dropout: Fraction of cells trained without labels.
        validation: Tables of latents.
        samples: Generates and scores cells in validations; worker 0 only.
    """

    validate_with_ema = True

    def __init__(
        self,
        dit: DiT,
        *,
        path: PathConfig,
        n_classes: Mapping[str, int],
        draws: FlowDraws,
        label_dropout: float,
        validation: Sequence[pa.Table],
        samples: FlowSamples | None = None,
    ):
        self.samples = samples
        self.sample_scores: Mapping[str, float] = {}
        self.module, self.path, self.n_classes, self.draws = dit, path, n_classes, draws
        self.label_dropout = label_dropout
        self._validation = draws.started([self._batch(table, None) for table in validation])

    def prepare(self, table: pa.Table, index: MicroBatchIndex) -> FlowBatch:
        return self._batch(table, index)

    def loss(self, model: Callable[..., Tensor], batch: FlowBatch, index: MicroBatchIndex) -> Tensor:
        conditions = drop_labels(
            batch.conditions, self.n_classes, p=self.label_dropout, uniform=batch.draws.coins,
            strategy=self.module.config.strategy,
        )  # fmt: skip
        return flow_losses(model, batch.latents, batch.draws, conditions, self.path)

    def validation(self, rank: int, world_size: int) -> tuple[dict[str, float], int]:
        device = next(self.module.parameters()).device
        total, n = 0.0, 0
        for held in self._validation[rank::world_size]:
            batch = map_tensors(held, lambda x: x.to(device))
            loss = flow_losses(self.module, batch.latents, batch.draws, batch.conditions, self.path)
            total += float(loss.double().sum())
            n += len(loss)
        self.sample_scores = {} if self.samples is None else self.samples.scores(self.module)
        return {"loss": total}, n

    def _batch(self, table: pa.Table, index: MicroBatchIndex | None) -> FlowBatch:
        cells = to_latent_batch(table, list(self.n_classes), shape=self.draws.shape)
        n = len(cells.joinids)
        draws = self.draws.for_validation(cells.joinids) if index is None else self.draws.for_micro_batch(index, n)
        return FlowBatch(cells.latents, cells.conditions, draws, cells.joinids, cells.weight)


def flow_losses(
    model: Callable[..., Tensor], x1: Tensor, draws: Draws, conditions: Mapping[str, Any], path: PathConfig
) -> Tensor:
    """Return the flow-matching loss of each cell, (b,), at its own start and time."""
    t0, t1 = training_interval(path)
    t = t0 + (t1 - t0) * draws.t
    sample = sample_path(draws.x0, x1, t, path.path)
    started = () if draws.from_control is None else (draws.from_control,)
    return flow_loss(model(sample.x_t, t, conditions, *started), sample, t, path)
