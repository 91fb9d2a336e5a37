"""What is trained: the VAE on cells, the flow on cached latents.

Shape letters: b cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.data.collate import LatentBatch, measured_group, to_cell_batch, to_latent_batch
from pipeline.data.order import FeedOrder
from pipeline.training.loop import Slice
from scldm.batch import CellBatch
from scldm.flow.config import PathConfig
from scldm.flow.objective import flow_loss
from scldm.flow.path import sample_path, training_interval
from scldm.gene_sampling import see_genes
from scldm.genes_seen import GenesSeenConfig
from scldm.nn.dit import DiT, drop_labels
from scldm.nn.likelihood import gene_probabilities, sample_genes
from scldm.nn.vae import VAE
from scldm.random import generator

GENES, NOISE, VALIDATION, SEEN = 1, 2, 3, 4  # streams of randomness


def seen_seed(seed: int, epoch: int) -> int:
    """Seed of the genes that the encoder sees in an epoch; with a cell's id it decides the draw."""
    return int(np.random.SeedSequence([seed, SEEN, epoch]).generate_state(1, np.uint64)[0])


class VaeObjective:
    """Negative log-likelihood of the cells' counts, in nats, summed over genes."""

    validate_with_ema = False

    def __init__(
        self,
        vae: VAE,
        *,
        labels: Sequence[str],
        mean_counts: Tensor,
        genes_per_step: int | None,
        max_genes: int | None,
        seed: int,
        validation: Sequence[pa.Table],
        measured: Tensor | None = None,
        genes_seen: GenesSeenConfig | None = None,
    ):
        self.module, self.labels, self.seed, self.max_genes = vae, labels, seed, max_genes
        self.measured = measured  # (p, g) bool: genes that each group of data sets measured; None: all of them
        self.genes_seen = genes_seen or GenesSeenConfig()
        found = mean_counts[mean_counts > 0]
        self.mean_counts = mean_counts.clamp(min=float(found.min()) if len(found) else 1.0)  # for weighted, > 0
        self.probability = None if genes_per_step is None else gene_probabilities(mean_counts, genes_per_step)
        self._validation = validation

    def loss(self, model: Callable[..., Tensor], table: pa.Table, part: Slice) -> tuple[Tensor, Tensor]:
        cells, seen = self._batch(table)
        if self.genes_seen.mode != "expressed":
            seen = self._drawn(cells, part.epoch)
        if self.probability is None:
            return model(cells, None, seen), cells.weight
        # The same genes on every worker and in every micro batch of a step.
        drawn = sample_genes(self.probability.to(cells.counts.device), generator(self.seed, GENES, part.step))
        return model(cells, drawn, seen), cells.weight

    def _drawn(self, cells: CellBatch, epoch: int) -> CellBatch:
        """What the encoder sees of the cells in an epoch; validation sees the expressed genes instead."""
        self.mean_counts = self.mean_counts.to(cells.counts.device)
        seed = seen_seed(self.seed, epoch)
        n_genes = len(self.mean_counts)
        return see_genes(cells, self.genes_seen, n_genes=n_genes, seed=seed, mean_counts=self.mean_counts)

    def validation(self, rank: int, world_size: int) -> tuple[float, int]:
        total, n = 0.0, 0
        for table in self._validation[rank::world_size]:
            cells, seen = self._batch(table)
            total += float(self.module(cells, None, seen).double().sum())
            n += cells.n_cells
        return total, n

    def _batch(self, table: pa.Table) -> tuple[CellBatch, CellBatch]:
        """The cells that are scored, and what the encoder sees of them."""
        device = next(self.module.parameters()).device
        cells = to_cell_batch(table, self.labels).to(device)
        if self.measured is not None:
            self.measured = self.measured.to(device)
            cells = replace(cells, measured=self.measured[measured_group(table).to(device)])
        if self.max_genes is None:
            return cells, cells
        return cells, to_cell_batch(table, self.labels, max_genes=self.max_genes, seed=self.seed).to(device)


class FlowObjective:
    """Flow-matching loss on cached latents; noise, times and dropped labels are functions of (seed, step, lane)."""

    validate_with_ema = True

    def __init__(
        self,
        dit: DiT,
        *,
        path: PathConfig,
        n_classes: Mapping[str, int],
        latent_shape: tuple[int, int],
        label_dropout: float,
        order: FeedOrder,
        lanes: Sequence[int],
        seed: int,
        validation: Sequence[pa.Table],
    ):
        self.module, self.path, self.n_classes, self.latent_shape = dit, path, n_classes, latent_shape
        self.label_dropout, self.order, self.lanes, self.seed = label_dropout, order, lanes, seed
        self.t0, self.t1 = training_interval(path)
        self._validation = [self._batch(table) for table in validation]

    def loss(self, model: Callable[..., Tensor], table: pa.Table, part: Slice) -> tuple[Tensor, Tensor]:
        batch = self._batch(table)
        noise, t, coins = (x[part.start : part.start + len(batch.joinids)] for x in self._draws(part.step))
        conditions = drop_labels(
            batch.conditions, self.n_classes, p=self.label_dropout, uniform=coins, strategy=self.module.config.strategy
        )
        return self._per_cell(model, batch, noise, t, conditions), batch.weight.to(
            next(self.module.parameters()).device
        )

    def _per_cell(
        self,
        model: Callable[..., Tensor],
        batch: LatentBatch,
        noise: Tensor,
        t: Tensor,
        conditions: Mapping[str, Tensor],
    ) -> Tensor:
        device = next(self.module.parameters()).device
        x1, noise, t = batch.latents.to(device), noise.to(device), self.t0 + (self.t1 - self.t0) * t.to(device)
        conditions = {k: v.to(device) for k, v in conditions.items()}
        sample = sample_path(noise, x1, t, self.path.path)
        return flow_loss(model(sample.x_t, t, conditions), sample, t, self.path)

    def _draws(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, times and coins for this worker's rows of a step."""
        noise, t, coins = [], [], []
        q = self.order.rows_per_lane
        for lane in self.lanes:
            g = generator(self.seed, NOISE, step, lane)
            noise.append(torch.randn(q, *self.latent_shape, generator=g))
            t.append(torch.rand(q, generator=g))
            coins.append(torch.rand(q, 1 + len(self.n_classes), generator=g))
        return torch.cat(noise), torch.cat(t), torch.cat(coins)

    def validation(self, rank: int, world_size: int) -> tuple[float, int]:
        """With noise and times fixed per batch, so that steps and runs compare."""
        total, n = 0.0, 0
        for i in range(rank, len(self._validation), world_size):
            batch = self._validation[i]
            g = generator(self.seed, VALIDATION, i)
            noise = torch.randn(batch.latents.shape, generator=g)
            t = torch.rand(len(noise), generator=g)
            total += float(self._per_cell(self.module, batch, noise, t, batch.conditions).double().sum())
            n += len(noise)
        return total, n

    def _batch(self, table: pa.Table) -> LatentBatch:
        return to_latent_batch(table, list(self.n_classes), shape=self.latent_shape)


def validation_tables(source, *, n_cells: int, batch_size: int, seed: int) -> list[pa.Table]:
    """Batches of validation cells, the same in every run: drawn by seed, read in storage order."""
    ids = source.ids
    if len(ids) > n_cells:
        rng = np.random.Generator(np.random.Philox(key=[seed, VALIDATION]))
        ids = np.sort(rng.choice(ids, n_cells, replace=False))
    return [source.read(ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]
