"""Checks between settings of different sections."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.config.job import ResourcesConfig, TrainConfig


def feed_problems(train: TrainConfig, resources: ResourcesConfig, where: str = "") -> list[str]:
    """Check that batch size, lanes and workers divide each other; return the problems."""
    feed, problems = train.feed, []
    if any(feed.lanes % n for n in resources.world_sizes):
        whole = math.lcm(*resources.world_sizes)
        problems.append(
            f"{where}train.feed.lanes ({feed.lanes}) must be a multiple of resources.workers ({resources.workers}); "
            f"set {where}train.feed.lanes={-(-feed.lanes // whole) * whole}"
        )
    if feed.batch_size % feed.lanes:
        problems.append(
            f"{where}train.feed.batch_size ({feed.batch_size}) must be a multiple of {where}train.feed.lanes "
            f"({feed.lanes}); set {where}train.feed.batch_size={-(-feed.batch_size // feed.lanes) * feed.lanes}"
        )
    return problems


def gpu_problems(stages: Sequence[str], resources: ResourcesConfig) -> list[str]:
    """Check that a training worker has one GPU or none; return the problems.

    Args:
        stages: Stages of the job that train on workers.
    """
    gpus = resources.gpus_per_worker
    if not stages or gpus in (0, 1):
        return []
    reason = (
        "NCCL refuses workers that share a GPU" if gpus < 1 else "a training worker uses one GPU, the others stay idle"
    )
    alone = "" if gpus > 1 else "; jobs of encode, generate and other batch stages may use a fraction"
    return [
        f"resources.gpus_per_worker ({gpus:g}) must be 0 or 1 for {' and '.join(stages)}: {reason}; set "
        f"resources.gpus_per_worker=1, and resources.workers to the number of GPUs{alone}"
    ]
