"""Train the flow-matching DiT on the latent cache; counts are not touched."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.job import TrainFlowConfig
from pipeline.stage import StageContext
from pipeline.stages.cards import model_card
from pipeline.training.trainer import fit, threads_per_worker


def run(config: TrainFlowConfig, context: StageContext) -> dict[str, Any]:
    """Facts: model (folder), steps, n_parameters, metrics, checkpoint."""
    spec = {
        "kind": "flow",
        "config": config.model_dump(mode="json"),
        "inputs": {k: asdict(m) for k, m in context.inputs.items()},
        "folder": str(context.folder),
        "version": context.folder.name,
        "seed": context.seed,
        "feed_engine": "ray",
        "tracker": context.tracker.spec(),
        "threads": threads_per_worker(context.resources),
        "card": model_card("flow", config, context.inputs),
        "storage": context.checkpoints.model_dump(mode="json"),
        "run_name": "/".join(context.folder.parts[-3:]),
    }
    return fit(spec, config.train, context.resources, "train_flow")
