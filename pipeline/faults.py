"""Places where a test, or a drill on a cluster, makes a process die: `SCLDM_FAULT="generate.before_record:n=2:kill"`.

The variable is read once, when the first point is passed; unset, a point costs one comparison. A fault is
`<point>[:n=<which time>]:<action>`; several are separated by commas. Actions: `kill` (SIGKILL of this process), `raise`
(RuntimeError), `exit=<code>`, `sleep=<seconds>`. Counts are per process. Actors get the driver's text with their
settings and call `arm`.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass

VARIABLE = "SCLDM_FAULT"

POINTS: dict[str, str] = {
    "generate.after_batch": "an actor has handed a tile of cells to the writer of its shard",
    "generate.before_rename": "a shard is whole and on disk, under its temporary name",
    "generate.before_record": "a shard has its name, and no record yet",
    "generate.after_record": "a shard and its record are committed",
    "generate.before_manifest": "all shards are committed, the stage's manifest is not written",
    "cells.before_rename": "embed, reconstruct, perturb, log_likelihood: a shard is whole, under its temporary name",
    "cells.before_record": "the same: a shard has its name, and no record yet",
    "cells.before_manifest": "the same: all shards and the index are there, the stage's manifest is not written",
}


@dataclass(frozen=True)
class Fault:
    point: str
    n: int
    action: str
    value: float = 0.0


class FaultError(RuntimeError):
    """What the action `raise` raises."""


_armed: tuple[Fault, ...] | None = None
_passed: Counter[str] = Counter()


def arm(text: str | None = None) -> None:
    """Take the faults of a text, or of the environment; counts start again."""
    global _armed
    _armed = parse(os.environ.get(VARIABLE, "") if text is None else text)
    _passed.clear()


def fault_point(point: str) -> None:
    """Do what the fault of this point says, if this is the time that it names."""
    if _armed is None:
        arm()
    if not _armed:
        return
    _passed[point] += 1
    for fault in _armed:
        if fault.point == point and fault.n == _passed[point]:
            _do(fault)


def parse(text: str) -> tuple[Fault, ...]:
    """Raises ValueError that names the point or action that does not exist."""
    return tuple(_fault(part) for part in filter(None, (p.strip() for p in text.split(","))))


def _fault(text: str) -> Fault:
    point, *parts = text.split(":")
    if point not in POINTS:
        raise ValueError(f"{VARIABLE}: no fault point {point!r}; there are {', '.join(POINTS)}")
    n, action, value = 1, "", 0.0
    for part in parts:
        name, _, given = part.partition("=")
        if name == "n" and given.isdigit() and int(given) > 0:
            n = int(given)
        elif name in ("kill", "raise") and not given and not action:
            action = name
        elif name in ("exit", "sleep") and given.replace(".", "", 1).isdigit() and not action:
            action, value = name, float(given)
        else:
            raise ValueError(f"{VARIABLE}: {part!r} in {text!r} is no n=<time>, kill, raise, exit=<code> or sleep=<s>")
    if not action:
        raise ValueError(f"{VARIABLE}: {text!r} names no action: kill, raise, exit=<code> or sleep=<s>")
    return Fault(point, n, action, value)


def _do(fault: Fault) -> None:
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "raise":
        raise FaultError(f"fault at {fault.point}, time {fault.n}")
    elif fault.action == "exit":
        os._exit(int(fault.value))
    else:
        time.sleep(fault.value)
