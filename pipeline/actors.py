"""The pool of actors of a batch job: as many as the job asks for, never more than there are tasks."""

from __future__ import annotations

from typing import Any

from pipeline.resources import ResourcesConfig


def actor_pool(resources: ResourcesConfig, n_tasks: int) -> Any:
    """`ActorPoolStrategy` that grows from resources.actors' min to its max as tasks wait."""
    from ray.data import ActorPoolStrategy

    most = max(1, min(resources.actors_max, n_tasks))
    return ActorPoolStrategy(min_size=min(resources.actors_min, most), max_size=most)
