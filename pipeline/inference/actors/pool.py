"""Runs the shards of a batch job on Ray actors that hold the models; without Ray, on one in a child process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from pipeline.cluster.child import in_child
from pipeline.config.resources import ResourcesConfig
from pipeline.core.shards import Record

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy

Spec = TypeVar("Spec")


def actor_pool(resources: ResourcesConfig, n_tasks: int) -> ActorPoolStrategy:
    """Return a pool that grows from resources.actors' min to its max as tasks wait, with at most one actor per task."""
    from ray.data import ActorPoolStrategy

    most = max(1, min(resources.actors_max, n_tasks))
    return ActorPoolStrategy(min_size=min(resources.actors_min, most), max_size=most)


def run_on_actors(
    actor: Callable[[Spec], Any], shards: list[int], spec: Spec, resources: ResourcesConfig, *, folder: Path
) -> Iterator[Record]:
    """Yield the records of shards as actors commit them. An actor of Ray that dies is restarted with its shard.

    Args:
        actor: Class that is built from `spec`; called with a table of one row, `shard`, it returns a table of records.
        shards: Numbers of the shards.
        folder: Of the stage; without Ray, worker.log is written there.
    """
    if not resources.ray:
        yield from in_child(_one_after_another, actor, shards, spec, resources=resources, folder=folder)
        return
    import ray.data

    tasks = ray.data.from_items([{"shard": k} for k in shards], override_num_blocks=len(shards))
    committed = tasks.map_batches(
        actor,
        fn_constructor_args=(spec,),
        batch_size=1,
        batch_format="pyarrow",
        compute=actor_pool(resources, len(shards)),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker or None,
    )
    yield from committed.iter_rows()


def _one_after_another(actor: Callable[[Spec], Any], shards: list[int], spec: Spec) -> Iterator[Record]:
    made = actor(spec)
    for shard in shards:
        yield from made(pa.table({"shard": [shard]})).to_pylist()
