"""Train the VAE: ragged cells from SOMA, through Ray Data, into DeepSpeed workers."""

from __future__ import annotations

from typing import Any

from pipeline.config.job import TrainVaeConfig
from pipeline.core.manifest import StageContext
from pipeline.stages.training_spec import worker_spec
from pipeline.training.trainer import fit


def run(config: TrainVaeConfig, context: StageContext) -> dict[str, Any]:
    """Facts: model (folder), latent_shape, steps, n_parameters, metrics, checkpoint."""
    return fit(worker_spec("vae", config, context), config.train, context.resources, "train_vae")
