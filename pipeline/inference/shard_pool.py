"""Shards of a batch job: made by actors under Ray, and which of an earlier attempt are still whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.resources import ResourcesConfig


def actor_pool(resources: ResourcesConfig, n_tasks: int) -> Any:
    """`ActorPoolStrategy` that grows from resources.actors' min to its max as tasks wait; no more actors than tasks."""
    from ray.data import ActorPoolStrategy

    most = max(1, min(resources.actors_max, n_tasks))
    return ActorPoolStrategy(min_size=min(resources.actors_min, most), max_size=most)


def made_by_actors(
    actor: type, todo: list[int], spec: dict[str, Any], resources: ResourcesConfig
) -> Iterator[dict[str, Any]]:
    """Records of the shards to do, as actors commit them. An actor that dies is started again with its shard.

    Args:
        actor: Built from `spec`; called with a table of one row, `shard`, it returns a table of records.
    """
    import ray.data

    shards = ray.data.from_items([{"shard": k} for k in todo], override_num_blocks=len(todo))
    made = shards.map_batches(
        actor,
        fn_constructor_args=(spec,),
        batch_size=1,
        batch_format="pyarrow",
        compute=actor_pool(resources, len(todo)),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker or None,
    )
    yield from made.iter_rows()


def committed(root: Path, folder: Path, records: str = "part-*.h5ad.json") -> list[dict[str, Any]]:
    """Records in `folder` of shards that still are what their record says; files are named from `root`."""
    found = []
    for path in sorted(folder.glob(records)):
        try:
            record = json.loads(path.read_text())
            with (root / record["file"]).open("rb") as f:
                whole = hashlib.file_digest(f, "sha256").hexdigest() == record["sha256"]
        except (OSError, ValueError, KeyError, TypeError):  # no file, or a record that is none: made again
            continue
        if whole:
            found.append(record)
    return found
