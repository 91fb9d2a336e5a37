"""What the workers of a training stage are told, as plain data."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any, Literal

from pipeline.config.job import TrainFlowConfig, TrainVaeConfig
from pipeline.config.resources import threads_per_worker
from pipeline.core.faults import VARIABLE
from pipeline.core.manifest import StageContext
from pipeline.stages.model_card import model_card


def worker_spec(
    kind: Literal["vae", "flow"], config: TrainVaeConfig | TrainFlowConfig, context: StageContext
) -> dict[str, Any]:
    """See `pipeline.training.worker.WorkerSpec`, which validates it on arrival."""
    return {
        "kind": kind,
        "config": config.model_dump(mode="json"),
        "inputs": {k: asdict(m) for k, m in context.inputs.items()},
        "folder": str(context.folder),
        "version": context.folder.name,
        "seed": context.seed,
        "feed_engine": "ray",
        "tracker": context.tracker.spec(),
        "threads": threads_per_worker(context.resources),
        "card": model_card(kind, config, context.inputs),
        "storage": context.checkpoints.model_dump(mode="json"),
        "run_name": "/".join(context.folder.parts[-3:]),
        "fault": os.environ.get(VARIABLE, ""),
    }
