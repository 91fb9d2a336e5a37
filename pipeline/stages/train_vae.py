"""Train the VAE: ragged cells from SOMA, through Ray Data, into DeepSpeed workers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipeline.job import TrainVaeConfig
from pipeline.stage import StageContext
from pipeline.stages.cards import model_card
from pipeline.training.trainer import fit, threads_per_worker


def run(config: TrainVaeConfig, context: StageContext) -> dict[str, Any]:
    """Facts: model (folder), latent_shape, steps, n_parameters, metrics, checkpoint."""
    spec = {
        "kind": "vae",
        "config": config.model_dump(mode="json"),
        "inputs": {k: asdict(m) for k, m in context.inputs.items()},
        "folder": str(context.folder),
        "version": context.folder.name,
        "seed": context.seed,
        "feed_engine": "ray",
        "tracker": context.tracker.spec(),
        "threads": threads_per_worker(context.resources),
        "card": model_card("vae", config, context.inputs),
        "storage": context.checkpoints.model_dump(mode="json"),
        "run_name": "/".join(context.folder.parts[-3:]),
    }
    return fit(spec, config.train, context.resources, "train_vae")
