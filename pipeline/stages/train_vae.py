"""Trains the VAE: sparse cells from SOMA, through Ray Data, into DeepSpeed workers."""

from __future__ import annotations

from typing import Any

from pipeline.config.job import TrainVaeConfig
from pipeline.core.manifest import StageContext
from pipeline.stages.training_spec import vae_spec
from pipeline.training.trainer import fit


def run(config: TrainVaeConfig, context: StageContext) -> dict[str, Any]:
    """Train and return the facts: model (folder), latent_shape, steps, n_parameters, metrics, checkpoint."""
    return fit(vae_spec(config, context), config.train, context.resources, "train_vae")
