"""Detects workers that the others wait for, by the time that each needs on its own before it exchanges gradients.

A collective ends on all workers when the last one has joined it, so the time of a whole step is the same on each and
tells nothing. What differs is the time before a step's first exchange of gradients: waiting for data, the host's work,
and on a CPU the passes of all micro batches but the last one's backward (under ZeRO 2: the first one's forward). The
reported wait is a lower bound. A GPU computes behind the host's back: there a slow host or disk is detected and a slow
GPU is not; nor is anything under ZeRO 3, whose forward passes are collective, nor what worker 0 does for all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.state import TrainingState

SLOW_RATIO = 1.5  # a straggler takes this many times the others' time, and
MIN_SHARE = 0.1  # costs the others this share of a step, or it is not reported
log = logging.getLogger(__name__)


class StragglerMonitor(TrainingCallback):
    """Measures this worker's own time, compares it with the others' and logs the slowest worker.

    Args:
        device: Where the times of all workers are gathered.
        clock: Returns seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._device, self._clock = device, clock
        self._since: float | None = None
        self._seconds, self._n_steps = 0.0, 0
        self._reported: int | None = None  # rank

    def on_gradient_exchange(self, state: TrainingState) -> None:
        """End this worker's own time, at the first exchange of the step."""
        if self._since is not None:
            self._seconds, self._n_steps = self._seconds + self._clock() - self._since, self._n_steps + 1
            self._since = None

    def collect_metrics(self, state: TrainingState) -> dict[str, float]:
        """Return `straggler_metrics` of the steps since the last call, the same on all workers. Collective."""
        seconds = torch.zeros(dist.get_world_size(), device=self._device)
        seconds[dist.get_rank()] = self.take_mean()
        dist.all_reduce(seconds)
        found = straggler_metrics(seconds.tolist())
        message = self.report(state.step, state.metrics | found)
        if message is not None and dist.get_rank() == 0:
            log.warning(message)
        return found

    def on_step_end(self, state: TrainingState) -> None:
        """Begin this worker's own time: all workers have finished the step."""
        self._since = self._clock()

    def on_checkpoint(self, state: TrainingState, *, saved: bool) -> None:
        """Begin it here instead: a checkpoint is written by all workers together."""
        self._since = self._clock()

    def take_mean(self) -> float:
        """Return this worker's own seconds per step since the last call."""
        seconds, n_steps = self._seconds, self._n_steps
        self._seconds, self._n_steps = 0.0, 0
        return seconds / max(1, n_steps)

    def report(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Return a message about a worker that delays the others; None if there is none, or if it was the last one
        reported."""
        ratio, wait = metrics.get("perf/straggler_ratio", 1.0), metrics.get("perf/straggler_wait_s", 0.0)
        if ratio < SLOW_RATIO or wait < MIN_SHARE * metrics.get("perf/step_s", 0.0):
            return None
        rank = int(metrics["perf/straggler_rank"])
        if rank == self._reported:
            return None
        self._reported = rank
        return (
            f"step {step}: the others wait at least {wait:.2f} s a step for worker {rank}, which takes {ratio:.1f} "
            "times their time before gradients are exchanged; check the load and the disk of its node"
        )


def straggler_metrics(seconds: Sequence[float]) -> dict[str, float]:
    """Compare the workers' own seconds per step.

    Returns:
        perf/straggler_ratio: the slowest worker's time over the mean of the others'.
        perf/straggler_wait_s: by how much it is longer.
        perf/straggler_rank: the slowest worker. Nothing if there is only one worker.
    """
    if len(seconds) == 1:
        return {}
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = (sum(seconds) - seconds[slowest]) / (len(seconds) - 1)
    return {
        "perf/straggler_ratio": seconds[slowest] / max(others, 1e-6),
        "perf/straggler_wait_s": seconds[slowest] - others,
        "perf/straggler_rank": float(slowest),
    }
