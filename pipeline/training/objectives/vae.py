"""Training of the VAE: the likelihood of the cells' counts.

Shape letters: b cells, g genes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.data.loading.collate import measured_group, to_cell_batch
from pipeline.training.objectives.base import Slice, map_tensors
from scldm.data.batch import CellBatch
from scldm.data.gene_sampling import see_genes
from scldm.data.genes_seen import GenesSeenConfig
from scldm.nn.likelihood import GeneSample, gene_probabilities, sample_genes
from scldm.nn.vae import VAE
from scldm.random import generator

GENES, NOISE, VALIDATION, SEEN = 1, 2, 3, 4  # streams of randomness


def seen_seed(seed: int, epoch: int) -> int:
    """Seed of the genes that the encoder sees in an epoch; with a cell's id it decides the draw."""
    return int(np.random.SeedSequence([seed, SEEN, epoch]).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class VaeBatch:
    """Cells, and what the encoder is shown of them where a cap cuts it."""

    cells: CellBatch
    fewer: CellBatch | None
    group: Tensor | None  # which row of `measured` a cell has, (b,)

    @property
    def weight(self) -> Tensor:
        return self.cells.weight

    @property
    def joinids(self) -> Tensor:
        return self.cells.joinids


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

    def prepare(self, table: pa.Table, part: Slice) -> VaeBatch:
        cells = to_cell_batch(table, self.labels)
        fewer = None
        if self.max_genes is not None:
            fewer = to_cell_batch(table, self.labels, max_genes=self.max_genes, seed=self.seed)
        return VaeBatch(cells, fewer, None if self.measured is None else measured_group(table))

    def loss(self, model: Callable[..., Tensor], batch: VaeBatch, part: Slice) -> Tensor:
        cells, seen = self.scored_and_seen(batch)
        if self.genes_seen.mode != "expressed":
            seen = self._drawn(cells, part.epoch)
        return model(cells, self.sample(part.step, cells.counts.device), seen)

    def sample(self, step: int, device: torch.device) -> GeneSample | None:
        """Genes that are scored in a step: the same on every worker and in every micro batch of it."""
        if self.probability is None:
            return None
        return sample_genes(self.probability.to(device), generator(self.seed, GENES, step))

    def _drawn(self, cells: CellBatch, epoch: int) -> CellBatch:
        """What the encoder sees of the cells in an epoch; validation sees the expressed genes instead."""
        self.mean_counts = self.mean_counts.to(cells.counts.device)
        seed = seen_seed(self.seed, epoch)
        n_genes = len(self.mean_counts)
        return see_genes(cells, self.genes_seen, n_genes=n_genes, seed=seed, mean_counts=self.mean_counts)

    def validation(self, rank: int, world_size: int) -> tuple[dict[str, float], int]:
        device = next(self.module.parameters()).device
        total, n = 0.0, 0
        for table in self._validation[rank::world_size]:
            cells, seen = self.scored_and_seen(map_tensors(self.prepare(table, Slice(0, 0, 0)), lambda x: x.to(device)))
            total += float(self.module(cells, None, seen).double().sum())
            n += cells.n_cells
        return {"loss": total}, n

    def scored_and_seen(self, batch: VaeBatch) -> tuple[CellBatch, CellBatch]:
        """The cells that are scored, and what the encoder sees of them."""
        cells = batch.cells
        if self.measured is not None and batch.group is not None:
            # On the device: a row for each cell would be the largest part of what travels there.
            self.measured = self.measured.to(batch.group.device)
            cells = replace(cells, measured=self.measured[batch.group])
        return cells, cells if batch.fewer is None else batch.fewer


def validation_tables(source, *, n_cells: int, batch_size: int, seed: int) -> list[pa.Table]:
    """Batches of validation cells, the same in every run: drawn by seed, read in storage order."""
    ids = source.ids
    if len(ids) > n_cells:
        rng = np.random.Generator(np.random.Philox(key=[seed, VALIDATION]))
        ids = np.sort(rng.choice(ids, n_cells, replace=False))
    return [source.read(ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]
