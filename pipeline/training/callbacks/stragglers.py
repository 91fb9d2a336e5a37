"""Which worker the others wait for: the time that each needs, by itself, from one step to the next one's gradients.

A collective ends on all workers when the last has come to it, so the time of a whole step is the same on each and
says nothing. What differs is the time before a step's first exchange of gradients: waiting for data, the host's work,
and on a CPU the passes of all micro batches but the last one's backward (under ZeRO 2: the first one's forward). What
is said is less than what the others wait. A GPU computes behind the host's back: there a slow host or disk is seen and
a slow GPU is not; nor is anything under ZeRO 3, whose forward passes are collective, nor what worker 0 does for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

SLOW = 1.5  # times the others' time, and
WORTH = 0.1  # of the step's time, before a line is printed


class Pace:
    """This worker's own time, summed over steps. `take` is collective, the rest is not.

    Args:
        device: Where the numbers of all workers are brought together.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._device, self._clock = device, clock
        self._since: float | None = None
        self._seconds, self._steps = 0.0, 0
        self._named: int | None = None

    def alone(self) -> None:
        """From here on the worker is on its own: all have ended a step, or what came after it."""
        self._since = self._clock()

    def meets(self) -> None:
        """The first gradients of a step are about to be computed, and exchanged."""
        if self._since is not None:
            self._seconds, self._steps = self._seconds + self._clock() - self._since, self._steps + 1
            self._since = None

    def take(self) -> dict[str, float]:
        """`straggler` of the steps since the last time, the same on all workers."""
        seconds = torch.zeros(dist.get_world_size(), device=self._device)
        seconds[dist.get_rank()] = self.mean()
        dist.all_reduce(seconds)
        return straggler(seconds.tolist())

    def mean(self) -> float:
        """Seconds of a step, since the last time."""
        seconds, steps = self._seconds, self._steps
        self._seconds, self._steps = 0.0, 0
        return seconds / max(1, steps)

    def remark(self, step: int, found: dict[str, float]) -> str | None:
        """A line about a worker that holds the others up, once until it is another's turn."""
        ratio, wait = found.get("perf/straggler_ratio", 1.0), found.get("perf/straggler_wait_s", 0.0)
        if ratio < SLOW or wait < WORTH * found.get("perf/step_s", 0.0):
            return None
        rank = int(found["perf/straggler_rank"])
        if rank == self._named:
            return None
        self._named = rank
        return (
            f"step {step}: the others wait {wait:.2f} s a step or more for worker {rank} ({ratio:.1f} times their time "
            "before gradients are exchanged); look at its node's load and disk"
        )


def straggler(seconds: Sequence[float]) -> dict[str, float]:
    """From each worker's own seconds a step: perf/straggler_ratio (the slowest one's over the mean of the others'),
    perf/straggler_wait_s (what it takes more, at least) and perf/straggler_rank. Nothing of one worker."""
    if len(seconds) == 1:
        return {}
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = (sum(seconds) - seconds[slowest]) / (len(seconds) - 1)
    return {
        "perf/straggler_ratio": seconds[slowest] / max(others, 1e-6),
        "perf/straggler_wait_s": seconds[slowest] - others,
        "perf/straggler_rank": float(slowest),
    }
