"""Nodes that Ray says are about to be taken away: when, seen from a worker; and gone, seen from the driver."""

from __future__ import annotations

import time
from typing import Any

from pipeline.training.callbacks.stop_signal import AT_ONCE

UNKNOWN_S = 60.0  # that a node whose time nobody said may take to go
LATE_S = 30.0  # that a node may be late


def node_goes_at() -> float | None:
    """Seconds since 1970 at which the first node of this run is taken away. Collective, under Ray Train."""
    import ray.train

    info = ray.train.get_preemption_info()
    if info is None:
        return None
    return AT_ONCE if info.deadline_ms is None else info.deadline_ms / 1000


def wait_until_gone(info: Any) -> None:
    """Until the nodes of a PreemptionInfo are dead, or should long have been.

    Ray counts a draining node among those to start workers on, and a start that waits for it times out. The workers
    ended shortly before the node's time, so there is little to wait for; where they ended of another reason, long
    before it, the other nodes are not kept waiting.
    """
    import ray

    most = time.time() + UNKNOWN_S
    until = LATE_S + (most if info.deadline_ms is None else min(most, info.deadline_ms / 1000))
    going = set(info.preempted_node_ids)
    while going & {n["NodeID"] for n in ray.nodes() if n["Alive"]}:
        if time.time() > until:
            print("the node is still there; trying all the same", flush=True)
            return
        time.sleep(0.5)
