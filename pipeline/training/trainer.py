"""Training on Ray: one TorchTrainer, workers that fail and come back, progress on the driver's terminal."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from pipeline.job import ResourcesConfig, TrainConfig
from pipeline.preflight import feed_problems
from pipeline.progress import ProgressReader
from pipeline.stage import InputError


def _on_worker(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs in every Ray Train worker; imports there, so that the driver stays light."""
    import ray.train

    from pipeline.training.worker import train_worker

    facts = train_worker(spec, on_checkpoint=lambda metrics: ray.train.report(metrics))
    return facts


def fit(spec: dict[str, Any], train: TrainConfig, resources: ResourcesConfig, stage: str) -> dict[str, Any]:
    """Run `train_worker` on `resources.workers` workers until it is done. Facts of the stage.

    A worker that dies takes the group with it; the group starts again and resumes from the newest checkpoint that
    verifies, at most `train.max_failures` times. What Ray itself stores of a run is not needed to resume.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    if problems := feed_problems(train, resources):
        raise InputError("\n".join(problems))
    gpu = resources.gpus_per_worker > 0
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if gpu:
        per_worker["GPU"] = resources.gpus_per_worker
    folder = Path(spec["folder"])
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config=spec,
        scaling_config=ScalingConfig(num_workers=resources.workers, use_gpu=gpu, resources_per_worker=per_worker),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=600),
        run_config=RunConfig(
            name=f"{stage}-{spec['version']}-{uuid.uuid4().hex[:6]}",
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )
    with ProgressReader(folder, stage, train.log_every_seconds):
        result = trainer.fit()
    if result.error is not None:
        raise result.error
    return result.return_value


def threads_per_worker(resources: ResourcesConfig) -> int:
    """Torch threads: what the job asked for, never more than the machine has."""
    return max(1, min(int(resources.cpus_per_worker), os.cpu_count() or 1))
