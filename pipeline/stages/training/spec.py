"""Builds the specification that the workers of a training stage receive."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.config.context import StageContext
from pipeline.config.job import TrainFlowConfig, TrainVaeConfig
from pipeline.config.resources import threads_per_worker
from pipeline.core.faults import VARIABLE
from pipeline.inference.models import model_on_every_node
from pipeline.stages.training.model_card import model_card
from pipeline.training.tasks.spec import FlowWorkerSpec, VaeWorkerSpec

log = logging.getLogger(__name__)


def vae_spec(config: TrainVaeConfig, context: StageContext) -> VaeWorkerSpec:
    """Build the specification of a worker of train_vae."""
    name = None if config.start_from is None else config.start_from.model
    start = _found(name, "vae", context)
    card = model_card("vae", config, context.inputs, given=_given(name, start))
    return VaeWorkerSpec(config=config, card=card, **common_spec(context), start_from=start)


def flow_spec(config: TrainFlowConfig, context: StageContext) -> FlowWorkerSpec:
    """Build the specification of a worker of train_flow."""
    name = None if config.start_from is None else config.start_from.model
    start = _found(name, "flow", context)
    card = model_card("flow", config, context.inputs, given=_given(name, start))
    return FlowWorkerSpec(config=config, card=card, **common_spec(context), start_from=start)


def log_start(stage: str, facts: Mapping[str, Any]) -> None:
    """Log what a training took over from the model that it started from."""
    if (start := facts.get("start_from")) is not None:
        from scldm.checkpoints.start_from import Started

        taken = Started(**{k: v for k, v in start.items() if k != "model"})
        for line in (f"{stage} started from the weights of {start['model']}", *taken.lines()):
            log.info("%s", line)


def _found(name: str | None, kind: Literal["vae", "flow"], context: StageContext) -> Path | None:
    """Return the folder of the model that training starts from: names are found here, not on every worker."""
    return None if name is None else model_on_every_node(name, kind, context.output)


def _given(name: str | None, folder: Path | None) -> tuple[str, Path] | None:
    return None if name is None or folder is None else (name, folder)


def common_spec(context: StageContext) -> dict[str, Any]:
    """Return the fields that the specifications of all training workers have."""
    return {
        "inputs": dict(context.inputs),
        "folder": context.folder,
        "version": context.folder.name,
        "seed": context.seed,
        "feed_engine": "ray" if context.resources.ray else "local",
        "tracker": context.tracker.spec(),
        "threads": threads_per_worker(context.resources),
        "storage": context.checkpoints,
        "run_name": "/".join(context.folder.parts[-3:]),
        "fault": os.environ.get(VARIABLE, ""),
    }
