"""Training of the flow: matching on latents, from the cache.

What is random (noise, times, dropped labels) is drawn for each lane of the order by (seed, step, lane), a row for each
of its cells. Which cell stands in a row follows from (seed, step) alone, so the draws are a function of (seed, step,
cell): they differ between workers, and a cell gets the same ones on any number of them. Validation has its own for each
cell, by (seed, cell): the same in every validation, in every run with the seed, however it is batched.

Shape letters: b cells, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.data.loading.collate import to_latent_batch
from pipeline.data.loading.order import FeedOrder
from pipeline.training.objectives.base import Slice, map_tensors
from pipeline.training.objectives.vae import NOISE, VALIDATION
from scldm.flow.config import PathConfig
from scldm.flow.objective import flow_loss
from scldm.flow.path import sample_path, training_interval
from scldm.nn.dit import DiT, drop_labels
from scldm.random import generator

if TYPE_CHECKING:
    from pipeline.training.objectives.samples import FlowSamples


@dataclass(frozen=True)
class Draws:
    """What is random about b cells of a flow."""

    noise: Tensor  # (b, m, e)
    t: Tensor  # (b,), uniform in [0, 1)
    coins: Tensor  # (b, 1 + labels), uniform: which labels are dropped

    def rows(self, start: int, n: int) -> Draws:
        return Draws(self.noise[start : start + n], self.t[start : start + n], self.coins[start : start + n])


class FlowDraws:
    """Draws of this worker's rows of a step, and of validation cells."""

    def __init__(
        self, seed: int, order: FeedOrder, lanes: Sequence[int], *, latent_shape: tuple[int, int], n_labels: int
    ):
        self.seed, self.lanes, self.rows_per_lane = seed, lanes, order.rows_per_lane
        self.shape, self.n_labels = latent_shape, n_labels
        self._at: tuple[int, Draws] | None = None

    def of(self, part: Slice, n: int) -> Draws:
        """Of a micro batch of n cells."""
        if self._at is None or self._at[0] != part.step:  # drawn once for all micro batches of the step
            lanes = [self._draw(self.rows_per_lane, NOISE, part.step, lane) for lane in self.lanes]
            self._at = (part.step, _joined(lanes))
        return self._at[1].rows(part.start, n)

    def of_validation(self, joinids: Tensor) -> Draws:
        return _joined([self._draw(1, VALIDATION, i) for i in joinids.tolist()])

    def _draw(self, n: int, *key: int) -> Draws:
        g = generator(self.seed, *key)
        noise = torch.randn(n, *self.shape, generator=g)
        return Draws(noise, torch.rand(n, generator=g), torch.rand(n, 1 + self.n_labels, generator=g))


def _joined(draws: Sequence[Draws]) -> Draws:
    return Draws(*(torch.cat([getattr(d, f) for d in draws]) for f in ("noise", "t", "coins")))


@dataclass(frozen=True)
class FlowBatch:
    """Latents of b cells with their draws."""

    latents: Tensor  # (b, m, e)
    conditions: Mapping[str, Tensor]
    draws: Draws
    joinids: Tensor
    weight: Tensor


class FlowObjective:
    """Flow-matching loss on cached latents."""

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
        self.samples = samples  # of worker 0
        self.sampled: dict[str, float] = {}  # scores of generated cells in the last validation, if it had any
        self.module, self.path, self.n_classes, self.draws = dit, path, n_classes, draws
        self.label_dropout = label_dropout
        self._validation = [self._batch(table, None) for table in validation]

    def prepare(self, table: pa.Table, part: Slice) -> FlowBatch:
        return self._batch(table, part)

    def loss(self, model: Callable[..., Tensor], batch: FlowBatch, part: Slice) -> Tensor:
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
        self.sampled = {} if self.samples is None else self.samples.scores(self.module)
        return {"loss": total}, n

    def _batch(self, table: pa.Table, part: Slice | None) -> FlowBatch:
        cells = to_latent_batch(table, list(self.n_classes), shape=self.draws.shape)
        n = len(cells.joinids)
        draws = self.draws.of_validation(cells.joinids) if part is None else self.draws.of(part, n)
        return FlowBatch(cells.latents, cells.conditions, draws, cells.joinids, cells.weight)


def flow_losses(
    model: Callable[..., Tensor], x1: Tensor, draws: Draws, conditions: Mapping[str, Any], path: PathConfig
) -> Tensor:
    """Flow-matching loss of each cell, (b,), at its own noise and time."""
    t0, t1 = training_interval(path)
    t = t0 + (t1 - t0) * draws.t
    sample = sample_path(draws.noise, x1, t, path.path)
    return flow_loss(model(sample.x_t, t, conditions), sample, t, path)
