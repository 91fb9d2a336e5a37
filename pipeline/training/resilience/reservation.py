"""What a killed driver still has of a cluster: nodes that Ray keeps for its run, given back when the run goes on.

Ray keeps a note of every run's nodes in an actor that outlives its driver, and takes it away after three minutes. A
driver that ends gives them back; of one that was killed they are missed, by a run on a range of workers for three
minutes. So worker 0 leaves its run's name in the stage's folder, and the next driver, which has the folder's lock,
gives back what stands under it. Both names are Ray's own affair: a test says so when they move.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.core.files import write_json_atomic

NOTE = "ray_run.json"
ACTOR = "AutoscalingCoordinator"  # its name, and its namespace
SECONDS = 10.0  # that an answer may take


def remember(folder: Path) -> None:
    """On a worker under Ray Train: leave the run's name."""
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        run = get_train_context().train_run_context.run_id
    except (ImportError, AttributeError):  # another version of Ray: the next run may wait
        return
    write_json_atomic(folder / NOTE, {"requester": f"train-{run}"})


def give_back(folder: Path) -> None:
    """On the driver, before its run: nodes of a run in this folder whose driver is dead."""
    import ray

    note = folder / NOTE
    try:
        requester = str(json.loads(note.read_text())["requester"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # none was left
    try:
        keeper = ray.get_actor(ACTOR, namespace=ACTOR)
        ray.get(keeper.cancel_request.remote(requester), timeout=SECONDS)
    except Exception as error:  # any: another cluster, another Ray. The run may wait, and goes on all the same
        if not isinstance(error, ValueError):  # there is no such actor: a new cluster
            print(f"nodes of the run before are kept for up to three minutes more: {error}", flush=True)
    note.unlink(missing_ok=True)
