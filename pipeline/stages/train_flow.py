"""Trains the flow-matching DiT on the latent cache; counts are read only if the VAE is trained with it."""

from __future__ import annotations

from typing import Any

from pipeline.config.job import TrainFlowConfig
from pipeline.core.manifest import StageContext
from pipeline.stages.training_spec import flow_spec
from pipeline.training.trainer import fit


def run(config: TrainFlowConfig, context: StageContext) -> dict[str, Any]:
    """Train and return the facts: model (folder), steps, n_parameters, metrics, checkpoint."""
    return fit(flow_spec(config, context), config.train, context.resources, "train_flow")
