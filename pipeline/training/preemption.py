"""Preempted nodes under Ray: when they are taken away, seen from a worker; and waiting for it, on the driver."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from pipeline.training.callbacks.stop_signal import UNKNOWN_TIME

if TYPE_CHECKING:
    from ray.train.v2.api.preemption import PreemptionInfo

UNKNOWN_S = 60.0  # seconds until a node goes whose time is not known
LATE_S = 30.0  # seconds that a node may be late
log = logging.getLogger(__name__)


def preemption_time() -> float | None:
    """Return when (seconds since 1970) the first node of this run is taken away; None if none is. Collective."""
    import ray.train

    info = ray.train.get_preemption_info()
    if info is None:
        return None
    return UNKNOWN_TIME if info.deadline_ms is None else info.deadline_ms / 1000


def wait_until_gone(info: PreemptionInfo) -> None:
    """Wait until the preempted nodes are dead, or should have been long ago.

    Ray counts a draining node among those to start workers on, and a start that waits for it times out. The workers
    ended shortly before the node's time, so the wait is short; if they ended for another reason, long before it, the
    other nodes are not kept waiting.
    """
    import ray

    latest = time.time() + UNKNOWN_S
    until = LATE_S + (latest if info.deadline_ms is None else min(latest, info.deadline_ms / 1000))
    leaving = set(info.preempted_node_ids)
    while leaving & {n["NodeID"] for n in ray.nodes() if n["Alive"]}:
        if time.time() > until:
            log.warning("the preempted node is still there; starting the workers nevertheless")
            return
        time.sleep(0.5)
