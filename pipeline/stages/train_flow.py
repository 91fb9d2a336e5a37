"""Trains the flow-matching DiT on the latent cache; counts are read only if the VAE is trained with it."""

from __future__ import annotations

from typing import Any

from pipeline.config.context import StageContext
from pipeline.config.job import TrainFlowConfig
from pipeline.stages.training.spec import flow_spec, log_start
from pipeline.training.trainer import fit


def run(config: TrainFlowConfig, context: StageContext) -> dict[str, Any]:
    """Train and return the facts: model (folder), steps, n_parameters, metrics, checkpoint."""
    facts = fit(flow_spec(config, context), config.train, context.resources, "train_flow")
    log_start("train_flow", facts)
    return facts
