"""The distil stage on a small flow, without Ray: its actors in this process, its workers as ranks of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helpers.stages.generation_case import NoTracker
from helpers.training.ranks import run as run_ranks
from pipeline.config.context import StageContext
from pipeline.config.job import DistilConfig, ResourcesConfig
from pipeline.core.manifest import Manifest
from pipeline.stages.training.distil import SPLITS, solve
from pipeline.stages.training.model_card import distilled_card
from pipeline.stages.training.trajectories import TrajectorySolver, TrajectorySpec

STEPS = 6
SETTINGS: dict[str, Any] = {
    "evaluations": 2,
    "trajectories": 48,
    "teacher_steps": 4,
    "shard_size": 20,
    "train": {
        "max_steps": STEPS,
        "validate_every": 3,
        "checkpoint_every": 2,
        "validation_cells": 16,
        "feed": {"batch_size": 16, "micro_batch_size": 8, "lanes": 2},
    },
}


def config_of(**settings: Any) -> DistilConfig:
    return DistilConfig.model_validate({**SETTINGS, **settings})


def context_of(folder: Path, inputs: dict[str, Manifest], seed: int = 0) -> StageContext:
    folder.mkdir(parents=True, exist_ok=True)
    behind = {k: inputs[k] for k in ("train_vae", "train_flow")}
    return StageContext(folder, behind, seed, ResourcesConfig(cpus_per_worker=1), NoTracker())


def local_pool(todo: list[int], spec: TrajectorySpec, context: StageContext) -> Iterator[dict[str, Any]]:
    """One actor, in this process."""
    actor = TrajectorySolver(spec)
    for shard in todo:
        yield actor.make(shard)


def worker_spec(folder: Path, inputs: dict[str, Manifest], **settings: Any) -> dict[str, Any]:
    """Solve the trajectories and return the specification of the workers, as JSON has it."""
    config, context = config_of(**settings), context_of(folder, inputs)
    teacher = inputs["train_flow"].path("model")
    records = solve(config, context, teacher, local_pool)
    return {
        "kind": "distil", "config": config.model_dump(mode="json"), "folder": str(folder), "version": "v", "seed": 0,
        "inputs": {k: asdict(m) for k, m in context.inputs.items()}, "feed_engine": "local", "tracker": {},
        "teacher": str(teacher), "card": distilled_card(config, teacher, context.inputs),
        "trajectories": {s: [(r["file"], r["n_cells"]) for r in records if r["split"] == s] for s in SPLITS},
    }  # fmt: skip


def distil(
    folder: Path, inputs: dict[str, Manifest], world_size: int = 1, fault: str = "", **settings: Any
) -> list[int]:
    """Solve and train; the exit codes of the ranks."""
    return run_ranks(worker_spec(folder, inputs, **settings), world_size, fault)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows that a training logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
