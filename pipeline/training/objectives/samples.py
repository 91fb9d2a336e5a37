"""Generates and scores a few cells on a schedule while the flow trains, with the metrics of `evaluate`.

For every held-out cell of a small fixed set a cell is generated with its labels, its library size and noise of its own,
by the averaged weights. So validations differ in the weights only, and a plot of the scores shows training and nothing
else. The library sizes are the real ones, so they are not scored. The log1p CP10k values of a Gaussian head are
compared with those of real cells.

Only worker 0 does it and the others wait, so the set should be small. If the cells cannot be scored, that is logged and
training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn

from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.flow.config import PathConfig, SamplerConfig
from scldm.generation.cell_maker import CellMaker, Recipe
from scldm.metrics.baselines import select_like
from scldm.metrics.cell_set import CellSet
from scldm.metrics.compare import CompareSettings, Comparison
from scldm.metrics.conditional import ConditionalSettings
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.from_anndata import cell_set
from scldm.metrics.genes.expression import as_counts, as_log_values, library_sizes
from scldm.metrics.labels import labelled

if TYPE_CHECKING:
    from anndata import AnnData

KEPT = ("w2", "mmd2", "frechet", "energy", "auroc", "precision", "recall", "gene_mean_r2", "gene_variance_r2")
KEPT_PER_LABEL = ("conditional_w2.", "label_accuracy.")
N_TOP_GENES, N_PCS, N_NEIGHBORS, MIN_CLASS = 2000, 30, 15, 8
log = logging.getLogger(__name__)


class FlowSamples:
    """Generates cells like a fixed set of held-out cells, and scores them.

    Args:
        held_out: Cells to resemble, none of them a training cell.
        training: Twice as many or more: the floor, and the cells that the space and the classifiers are fitted on.
        vae: The decoder, on the flow's device.
        every: Validations between two scorings; the first one is scored.
        seed: The seed of noise and counts.
    """

    def __init__(
        self, held_out: AnnData, training: AnnData, vae: LoadedVAE, *, path: PathConfig, every: int, seed: int
    ):
        self.vae, self.path, self.every, self.seed, self.n_validations = vae, path, every, seed, 0
        names = [x.name for x in vae.vocabulary.labels]
        self.real, train = cell_set(held_out, names), cell_set(training, names)
        given = [name for name in names if labelled(self.real.labels[name]).all()]
        rng = np.random.default_rng(seed)
        floor = select_like(train.crossed(given), self.real.crossed(given), rng).indices
        reference = train[np.setdiff1d(np.arange(train.n_cells), floor)]
        pcs = min(N_PCS, reference.n_cells - 1, reference.counts.shape[1] - 1)
        space = RealSpace.fit(reference.counts, n_top_genes=N_TOP_GENES, n_pcs=pcs, seed=seed)
        conditional = ConditionalSettings(MIN_CLASS, transport_cells=512, average="cells", control={})
        settings = CompareSettings(N_NEIGHBORS, 512, seed, conditional, resamples=0, refits=0)
        self.comparison = Comparison(self.real, reference, space, settings, labels=given, counted=self._draws_counts)
        self.floor = self._scores(train[floor], "_floor")
        self.floor |= {
            f"gen_{k}_floor": s.value
            for k, s in self.comparison.real_label_scores().items()
            if k.startswith(KEPT_PER_LABEL)
        }

    @property
    def _draws_counts(self) -> bool:
        return self.vae.vae.config.head != "gaussian"

    def scores(self, dit: nn.Module) -> dict[str, float]:
        """Return `gen_<metric>` and `gen_<metric>_floor`; nothing between two scorings."""
        self.n_validations += 1
        if (self.n_validations - 1) % self.every:
            return {}
        try:
            with _evaluating(dit):
                generated = self._generate(dit)
            return self._scores(generated) | self.floor
        except (ValueError, FloatingPointError) as error:
            log.warning(f"the cells generated in this validation cannot be scored: {error}")
            return {}

    def _generate(self, dit: Any) -> CellSet:
        config = self.vae.vae.config
        flow = LoadedFlow(
            dit, self.path, self.vae.vocabulary, self.vae.library_sizes, config.n_latent_tokens, config.latent_width
        )
        size = np.maximum(library_sizes(self.real.counts), 1.0)
        recipe = Recipe(
            stops=np.arange(1, self.real.n_cells + 1),
            conditions={x.name: x.encode(list(self.real.labels[x.name])) for x in self.vae.vocabulary.labels},
            scale={},
            log_mean=np.log(size),
            log_sd=np.zeros(len(size)),
        )
        maker = CellMaker(self.vae, flow, recipe, sampler=SamplerConfig(), seed=self.seed)
        values = sp.vstack([part.values for part in maker.cells(0, self.real.n_cells)], format="csr")
        if not self._draws_counts:
            return CellSet(as_log_values(values), self.real.labels, counted=False)
        return CellSet(as_counts(values), self.real.labels)

    def _scores(self, cells: CellSet, suffix: str = "") -> dict[str, float]:
        found = self.comparison.all_scores({"generated cells": cells})["generated cells"].scores
        kept = {k: s for k, s in found.items() if k in KEPT or k.startswith(KEPT_PER_LABEL)}
        return {f"gen_{k}{suffix}": s.value for k, s in kept.items()}


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
