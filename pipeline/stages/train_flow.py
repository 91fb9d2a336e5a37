"""Trains the flow-matching DiT on the latent cache; counts are read only if the VAE is trained with it."""

from __future__ import annotations

import logging
from typing import Any

from pipeline.config.context import StageContext
from pipeline.config.job import TrainFlowConfig
from pipeline.data.ingest.controls import check_controls
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.stages.training.spec import flow_spec, log_start
from pipeline.training.trainer import fit

log = logging.getLogger(__name__)


def run(config: TrainFlowConfig, context: StageContext) -> dict[str, Any]:
    """Train and return the facts: model (folder), steps, n_parameters, metrics, checkpoint; notes on control cells."""
    notes = []
    if config.start is not None:
        notes = check_controls(config.start, IngestedDataset.open(context.inputs["ingest"]))
    for note in notes:
        log.info("train_flow: %s", note)
    facts = fit(flow_spec(config, context), config.train, context.resources, "train_flow")
    log_start("train_flow", facts)
    return facts | ({"notes": notes} if notes else {})
