"""Inject faults into a process, in a test or a drill on a cluster: `SCLDM_FAULT="checkpoint.after_shard:n=2:kill"`.

A fault is `<point>[:rank=<worker>][:step=<training step>][:n=<occurrence>]:<action>`; several are separated by commas.
Actions: `kill` (SIGKILL of this process), `stop` (SIGSTOP: it hangs), `term` (SIGTERM: a stop signal), `raise`
(FaultError), `exit=<code>`, `sleep=<seconds>`. Occurrences are counted per process: a restarted worker counts from one.
The variable is read once, when the first point is passed; if it is unset, a point costs one comparison.
Actors and training workers get the driver's specification with their settings and call `arm`.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass

from pipeline.core.fault_points import POINTS
from scldm.text import did_you_mean

VARIABLE = "SCLDM_FAULT"
SIGNALS = {"kill": "SIGKILL", "stop": "SIGSTOP", "term": "SIGTERM"}
FORM = "<point>[:rank=<r>][:step=<s>][:n=<occurrence>]:<kill|stop|term|raise|exit=<code>|sleep=<seconds>>"


@dataclass(frozen=True)
class Fault:
    """One parsed fault."""

    point: str
    action: str
    value: float = 0.0  # exit code, or seconds to sleep
    n: int = 1
    rank: int | None = None  # None: any
    step: int | None = None


class FaultError(RuntimeError):
    """Raised by the action `raise`."""


_armed: tuple[Fault, ...] | None = None
_passed: Counter[Fault] = Counter()


def arm(text: str | None = None) -> None:
    """Activate the faults of a specification, by default the environment's, and reset all counts.

    Raises:
        ValueError: See `parse`.
    """
    global _armed
    _armed = parse(os.environ.get(VARIABLE, "") if text is None else text)
    _passed.clear()


def fault_point(point: str, *, step: int | None = None) -> None:
    """Trigger the fault of this point, if this is the occurrence that it names."""
    if _armed == ():
        return
    if _armed is None:
        arm()
    for fault in _armed or ():
        if fault.point == point and fault.rank in (None, _rank()) and fault.step in (None, step):
            _passed[fault] += 1
            if _passed[fault] == fault.n:
                _trigger(fault)


def passed() -> dict[str, int]:
    """Return how often each point of an active fault was passed since the last `arm`."""
    return {fault.point: n for fault, n in _passed.items()}


def _rank() -> int:
    """Return the rank of a training worker, from torchrun or Ray Train; 0 in any other process."""
    return int(os.environ.get("RANK", "0"))


# ---- the specification -------------------------------------------------------------------------------------------
def parse(text: str) -> tuple[Fault, ...]:
    """Parse a specification.

    Raises:
        ValueError: It is malformed; the message lists every problem.
    """
    found: list[Fault] = []
    problems: list[str] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        try:
            found.append(_fault(part))
        except ValueError as error:
            problems.append(f"{VARIABLE}: {error}")
    if problems:
        raise ValueError("\n".join([*problems, "`scldm faults` lists the points; unset the variable to run without"]))
    return tuple(found)


def _fault(text: str) -> Fault:
    point, *parts = text.split(":")
    if point not in POINTS:
        hint = did_you_mean(point, POINTS)
        raise ValueError(f"there is no fault point {point!r}" + (f" ({hint})" if hint else ""))
    numbers: dict[str, int] = {}
    action, value = "", 0.0
    for part in parts:
        name, _, given = part.partition("=")
        if name in ("n", "rank", "step") and given.isdigit() and name not in numbers and (name != "n" or int(given)):
            numbers[name] = int(given)
        elif (name in SIGNALS or name == "raise") and part == name and not action:
            action = name
        elif name in ("exit", "sleep") and given.replace(".", "", name == "sleep").isdigit() and not action:
            action, value = name, float(given)
        else:
            raise ValueError(f"{part!r} in {text!r} cannot be read; a fault is {FORM}")
    if not action:
        raise ValueError(f"{text!r} names no action; a fault is {FORM}")
    if "step" in numbers and not POINTS[point].has_step:
        raise ValueError(f"{text!r}: {point} has no step; give n, the occurrence")
    return Fault(point, action, value, **numbers)


def _trigger(fault: Fault) -> None:
    if fault.action in SIGNALS:
        os.kill(os.getpid(), getattr(signal, SIGNALS[fault.action]))
    elif fault.action == "raise":
        raise FaultError(f"fault at {fault.point}, time {fault.n}")
    elif fault.action == "exit":
        os._exit(int(fault.value))
    else:
        time.sleep(fault.value)
