"""Trains a distilled flow: its jumps follow trajectories that its teacher solved (`scldm.flow.distilled`).

A row is a trajectory with its labels, so that nothing is drawn here: noise and labels were drawn when it was solved.
The loss of a trajectory is the mean over its jumps of how far they miss; validation reports it for each jump too.

Shape letters: b trajectories, n jumps, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from torch import Tensor

from pipeline.data.loading.collate import to_latent_batch
from pipeline.training.objectives.base import MicroBatchIndex, map_tensors
from scldm.flow.distilled import jump_losses
from scldm.nn.dit import DiT


@dataclass(frozen=True)
class TrajectoryBatch:
    """Solved trajectories of a micro batch."""

    states: Tensor  # (b, n + 1, m, e): noise first, the teacher's latents last
    conditions: Mapping[str, Tensor]  # label -> class ids (b,)
    joinids: Tensor
    weight: Tensor


class DistilObjective:
    """Mean square by which jumps miss the teacher's trajectories.

    Args:
        dit: The network, with the teacher's weights at first.
        times: Of the jumps, n + 1.
        latent_shape: (m, e).
        validation: Tables of trajectories.
    """

    validate_with_ema = True

    def __init__(
        self, dit: DiT, *, times: Sequence[float], latent_shape: tuple[int, int], validation: Sequence[pa.Table]
    ):
        self.module, self.times, self.shape = dit, list(times), latent_shape
        self.sample_scores: Mapping[str, float] = {}
        self._validation = [self._batch(table) for table in validation]

    def prepare(self, table: pa.Table, index: MicroBatchIndex) -> TrajectoryBatch:
        return self._batch(table)

    def loss(self, model: Callable[..., Tensor], batch: TrajectoryBatch, index: MicroBatchIndex) -> Tensor:
        return jump_losses(model, batch.states, batch.conditions, self.times).mean(1)

    def validation(self, rank: int, world_size: int) -> tuple[dict[str, float], int]:
        device = next(self.module.parameters()).device
        n_jumps = len(self.times) - 1
        totals, n = {"loss": 0.0, **{f"jump_{i}": 0.0 for i in range(1, n_jumps + 1)}}, 0
        for held in self._validation[rank::world_size]:
            batch = map_tensors(held, lambda x: x.to(device))
            misses = jump_losses(self.module, batch.states, batch.conditions, self.times).double()
            totals["loss"] += float(misses.mean(1).sum())
            for i in range(n_jumps):
                totals[f"jump_{i + 1}"] += float(misses[:, i].sum())
            n += len(misses)
        return totals, n

    def _batch(self, table: pa.Table) -> TrajectoryBatch:
        m, e = self.shape
        rows = to_latent_batch(table, list(self.module.n_classes), shape=(len(self.times) * m, e))
        states = rows.latents.unflatten(1, (len(self.times), m))
        return TrajectoryBatch(states, rows.conditions, rows.joinids, rows.weight)
