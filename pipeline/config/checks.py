"""Checks between settings of different sections."""

from __future__ import annotations

import math

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
