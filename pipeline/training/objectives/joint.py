"""Trains the VAE and the flow together: counts are streamed, the encoder is in the graph, no latent is cached.

The loss of a cell is that of the flow at its latent plus `vae.weight` times the negative log-likelihood of its counts,
in nats. The likelihood ties the latent to the cell: with the flow's loss alone the encoder would learn latents that are
easy to match and carry no information. Averaged and raw weights of both networks are exported; a sampler takes both
from the same side, because an averaged flow matches averaged latents.

Shape letters: b cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pyarrow as pa
from torch import Tensor, nn

from pipeline.training.objectives.base import MicroBatchIndex, map_tensors
from pipeline.training.objectives.flow import Draws, FlowDraws, flow_losses
from pipeline.training.objectives.vae import VaeBatch, VaeObjective
from scldm.data.batch import CellBatch
from scldm.flow.config import PathConfig
from scldm.nn.dit import DiT, drop_labels
from scldm.nn.likelihood import GeneSample
from scldm.nn.vae import VAE


class Joint(nn.Module):
    """Both networks as one module, so that one engine averages, clips and steps them."""

    def __init__(self, vae: VAE, dit: DiT, *, path: PathConfig):
        super().__init__()
        self.vae, self.dit, self.path = vae, dit, path

    def forward(
        self,
        cells: CellBatch,
        seen: CellBatch,
        draws: Draws,
        conditions: Mapping[str, Tensor],
        sample: GeneSample | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the flow's loss and the negative log-likelihood (nats) of each cell, both (b,).

        Args:
            cells: Counts that are scored.
            seen: The same cells as the encoder sees them.
            sample: Genes that are scored; all if None.
        """
        z = self.vae.encode(seen)  # (b, m, e)
        return flow_losses(self.dit, z, draws, conditions, self.path), self.vae.nll(cells, z, sample=sample)


@dataclass(frozen=True)
class JointBatch:
    """Cells, with the random numbers of their flow."""

    cells: VaeBatch
    draws: Draws

    @property
    def weight(self) -> Tensor:
        return self.cells.weight

    @property
    def joinids(self) -> Tensor:
        return self.cells.joinids


class JointObjective:
    """Flow-matching loss plus weighted likelihood, on counts.

    Args:
        counts: Prepares cells, as in the training of the VAE alone.
        draws: Draws noise, times and dropped labels.
        weight: The weight of the likelihood.
        validation: Tables of cells.
    """

    validate_with_ema = True
    sample_scores: Mapping[str, float] = MappingProxyType({})  # it generates no cells

    def __init__(
        self,
        module: Joint,
        counts: VaeObjective,
        draws: FlowDraws,
        *,
        weight: float,
        n_classes: Mapping[str, int],
        label_dropout: float,
        validation: Sequence[pa.Table],
    ):
        self.module, self.counts, self.draws, self.weight = module, counts, draws, weight
        self.n_classes, self.label_dropout, self._validation = n_classes, label_dropout, validation

    def prepare(self, table: pa.Table, index: MicroBatchIndex) -> JointBatch:
        return JointBatch(self.counts.prepare(table, index), self.draws.for_micro_batch(index, len(table)))

    def loss(self, model: Callable[..., tuple[Tensor, Tensor]], batch: JointBatch, index: MicroBatchIndex) -> Tensor:
        cells, seen = self.counts.scored_and_seen(batch.cells)
        conditions = drop_labels(
            cells.conditions, self.n_classes, p=self.label_dropout, uniform=batch.draws.coins,
            strategy=self.module.dit.config.strategy,
        )  # fmt: skip
        flow, nll = model(cells, seen, batch.draws, conditions, batch.cells.sample)
        return flow + self.weight * nll

    def validation(self, rank: int, world_size: int) -> tuple[dict[str, float], int]:
        """Return sums of the loss, and of its two parts without weight; and the number of cells."""
        device = next(self.module.parameters()).device
        flow, nll, n = 0.0, 0.0, 0
        for table in self._validation[rank::world_size]:
            counts = self.counts.prepare_validation(table)
            held = JointBatch(counts, self.draws.for_validation(counts.joinids))
            batch: Any = map_tensors(held, lambda x: x.to(device))
            cells, seen = self.counts.scored_and_seen(batch.cells)
            flows, nlls = self.module(cells, seen, batch.draws, cells.conditions)
            flow, nll, n = flow + float(flows.double().sum()), nll + float(nlls.double().sum()), n + cells.n_cells
        return {"loss": flow + self.weight * nll, "flow": flow, "nll": nll}, n


def part_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the weights of one of the two networks, `vae` or `dit`, out of those of `Joint`."""
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
