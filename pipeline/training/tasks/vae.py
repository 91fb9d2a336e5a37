"""Where the training of a VAE ends: theta of every gene is fitted, given the means that it has learned."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.config.job import VaeTrainConfig
from pipeline.training.objectives.base import Slice, map_tensors
from pipeline.training.objectives.vae import VaeObjective, validation_tables
from scldm.nn.dispersion import fit_theta
from scldm.nn.vae import VAE


def fit_dispersions(
    vae: VAE, objective: VaeObjective, source: Any, train: VaeTrainConfig, *, seed: int
) -> dict[str, float]:
    """Fit theta on training cells, drawn by seed: a function of the trained weights alone, whoever trained them."""
    device = next(objective.module.parameters()).device
    tables = validation_tables(source, n_cells=train.theta_cells, batch_size=train.feed.micro_batch_size, seed=seed)
    batches = (map_tensors(objective.prepare(t, Slice(0, 0, 0)), lambda x: x.to(device)) for t in tables)
    fit = fit_theta(vae.to(device), (objective.scored_and_seen(b)[0] for b in batches))
    vae.cpu()
    return asdict(fit)
