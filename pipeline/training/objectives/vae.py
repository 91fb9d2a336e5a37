"""Trains the VAE by the likelihood of the cells' counts.

Shape letters: b cells, g genes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.data.loading.blocks import BlockSource
from pipeline.data.loading.collate import measured_group, to_cell_batch
from pipeline.training.objectives.base import MicroBatchIndex, map_tensors
from scldm.data.batch import CellBatch
from scldm.data.gene_sampling import see_genes
from scldm.data.genes_seen import GenesSeenConfig
from scldm.nn.likelihood import GeneSample, gene_probabilities, sample_genes
from scldm.nn.vae import VAE
from scldm.random import generator

GENES, NOISE, VALIDATION, SEEN = 1, 2, 3, 4  # streams of randomness


def seen_seed(seed: int, epoch: int) -> int:
    """Return the seed of the genes that the encoder sees in an epoch; with a cell's id it determines the draw."""
    return int(np.random.SeedSequence([seed, SEEN, epoch]).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class VaeBatch:
    """Cells, with what is drawn of their genes."""

    cells: CellBatch
    seen: CellBatch | None  # the same cells with the genes that the encoder sees; None: the expressed ones
    sample: GeneSample | None  # genes that are scored; None: all
    group: Tensor | None  # the cell's row of `measured`, (b,)

    @property
    def weight(self) -> Tensor:
        return self.cells.weight

    @property
    def joinids(self) -> Tensor:
        return self.cells.joinids


class VaeObjective:
    """Negative log-likelihood of the cells' counts, in nats, summed over genes.

    Args:
        mean_counts: Mean count of each gene, (g,).
        genes_per_step: Genes that are scored in a step; all if None.
        max_genes: Most expressed genes of a cell that the encoder sees; all if None.
        validation: Tables of cells.
        measured: Genes that each group of data sets measured, (p, g) bool; all genes if None.
        genes_seen: Which genes the encoder sees in training.
    """

    validate_with_ema = False
    sample_scores: Mapping[str, float] = MappingProxyType({})  # it generates no cells

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
        self.measured = measured
        self._measured: dict[torch.device, Tensor] = {}
        self.genes_seen = genes_seen or GenesSeenConfig()
        found = mean_counts[mean_counts > 0]
        self.mean_counts = mean_counts.clamp(min=float(found.min()) if len(found) else 1.0)  # for weighted, > 0
        self.probability = None if genes_per_step is None else gene_probabilities(mean_counts, genes_per_step)
        self._validation = validation

    def prepare(self, table: pa.Table, index: MicroBatchIndex) -> VaeBatch:
        """Collate cells, and draw the genes that are seen and scored, so that no device has to be asked for sizes."""
        batch = self.prepare_validation(table)
        if self.genes_seen.mode != "expressed":
            batch = replace(batch, seen=self._drawn(self.scored_and_seen(batch)[0], index.epoch).with_longest())
        return replace(batch, sample=self._sample(index.step))

    def prepare_validation(self, table: pa.Table) -> VaeBatch:
        """Collate cells: all genes are scored, and the encoder sees the expressed ones, at most `max_genes`."""
        cells, seen = to_cell_batch(table, self.labels).with_longest(), None
        if self.max_genes is not None:
            seen = to_cell_batch(table, self.labels, max_genes=self.max_genes, seed=self.seed).with_longest()
        return VaeBatch(cells, seen, None, None if self.measured is None else measured_group(table))

    def loss(self, model: Callable[..., Tensor], batch: VaeBatch, index: MicroBatchIndex) -> Tensor:
        cells, seen = self.scored_and_seen(batch)
        return model(cells, batch.sample, seen)

    def _sample(self, step: int) -> GeneSample | None:
        """Return the genes that are scored in a step: the same on every worker and in each of its micro batches."""
        return None if self.probability is None else sample_genes(self.probability, generator(self.seed, GENES, step))

    def _drawn(self, cells: CellBatch, epoch: int) -> CellBatch:
        """Return the cells as the encoder sees them in an epoch."""
        seed, n_genes = seen_seed(self.seed, epoch), len(self.mean_counts)
        seen = see_genes(cells, self.genes_seen, n_genes=n_genes, seed=seed, mean_counts=self.mean_counts)
        return replace(
            seen, measured=None
        )  # what was not measured is not among the genes; a row for each cell is large

    def validation(self, rank: int, world_size: int) -> tuple[dict[str, float], int]:
        device = next(self.module.parameters()).device
        total, n = 0.0, 0
        for table in self._validation[rank::world_size]:
            batch = map_tensors(self.prepare_validation(table), lambda x: x.to(device))
            cells, seen = self.scored_and_seen(batch)
            total += float(self.module(cells, None, seen).double().sum())
            n += cells.n_cells
        return {"loss": total}, n

    def scored_and_seen(self, batch: VaeBatch) -> tuple[CellBatch, CellBatch]:
        """Return the cells that are scored, and the same cells as the encoder sees them."""
        cells = batch.cells
        if self.measured is not None and batch.group is not None:
            # Expanded on the device: a row for each cell would be the largest part of what is copied there.
            cells = replace(cells, measured=self._measured_on(batch.group.device)[batch.group])
        return cells, cells if batch.seen is None else batch.seen

    def _measured_on(self, device: torch.device) -> Tensor:
        assert self.measured is not None
        if device not in self._measured:  # the thread that prepares batches asks on the CPU
            self._measured[device] = self.measured.to(device)
        return self._measured[device]


def validation_tables(source: BlockSource, *, n_cells: int, batch_size: int, seed: int) -> list[pa.Table]:
    """Read tables of validation cells, the same in every run: drawn by seed, in storage order."""
    ids = source.ids
    if len(ids) > n_cells:
        rng = np.random.Generator(np.random.Philox(key=[seed, VALIDATION]))
        ids = np.sort(rng.choice(ids, n_cells, replace=False))
    return [source.read(ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]
