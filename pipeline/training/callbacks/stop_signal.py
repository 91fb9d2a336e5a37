"""Stops all workers at the same step, on a signal, a file, or because a node is about to be taken away.

A worker checks its own sources when a step begins, and the answers are reduced on the CPU while the step computes, so
the check costs the step nothing and all workers stop at the same boundary.

A node that is taken away at a known time is used until then: a checkpoint immediately, in case the node goes early, and
another in the last moments, after which the workers end. So a kept deadline costs no step, and little of the node's
time.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.state import TrainingState

STOP_FILE = "stop.request"
CHECK_FILE_EVERY = 1.0  # seconds between checks of the file system
STOP, CHECK_NODES = 0, 1  # indices of the flags
UNKNOWN_TIME = 0.0  # the deadline of a node that goes at an unknown time


class StopRequest(Enum):
    """What a step has to do at its end."""

    NONE = "none"
    SAVE = "save"  # write a checkpoint and continue
    STOP = "stop"  # write a checkpoint and end


class StopSignal(TrainingCallback):
    """Checks whether the run has to stop. The constructor, `begin_check` and `finish_check` are collective.

    Args:
        folder: The stage's folder; a file `stop.request` in it is a signal. Checked by rank 0.
        preempted: Returns when (seconds since 1970) a node of this run is taken away; None if none is, UNKNOWN_TIME if
            the time is not known. Collective, with the same answer on all workers, and not free: called at most every
            `every_seconds`.
        margin: Returns how many seconds before that time to end: what a checkpoint takes, and more.
        clock: Returns seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        preempted: Callable[[], float | None] | None = None,
        *,
        margin: Callable[[], float] = lambda: 10.0,
        every_seconds: float = 2.0,
        clock: Callable[[], float] = time.time,
    ):
        self.file = folder / STOP_FILE
        self.signalled = False
        self.deadline: float | None = None  # of the first node that is taken away
        self._preempted, self._every, self._margin, self._clock = preempted, every_seconds, margin, clock
        self._group = dist.new_group(backend="gloo")  # its own: a flag must not wait behind gradients, nor for a device
        self._flags = torch.zeros(2, dtype=torch.int32)
        self._work: dist.Work | None = None
        self._checked_file = self._checked_nodes = time.monotonic()
        self._handler_before: Any = None

    def on_train_start(self, state: TrainingState) -> None:
        """Take SIGTERM as a stop signal. Only a main thread can; under Ray it is the driver that gets the signal."""
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "signalled", True))

    def on_train_end(self, state: TrainingState) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler_before)

    def on_step_start(self, state: TrainingState) -> None:
        self.begin_check()

    def on_step_end(self, state: TrainingState) -> None:
        request = self.finish_check()
        if request is StopRequest.SAVE:
            state.request_checkpoint()
        elif request is StopRequest.STOP:
            state.request_stop()

    def begin_check(self) -> None:
        """Check this worker's sources and start the reduction over all workers."""
        now = time.monotonic()
        self._flags[STOP] = int(self.signalled or self._deadline_is_near() or self._file_exists(now))
        self._flags[CHECK_NODES] = int(self._preempted is not None and now - self._checked_nodes >= self._every)
        self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def finish_check(self) -> StopRequest:
        """Return the answer, the same on all workers."""
        assert self._work is not None
        self._work.wait()
        if self._flags[STOP]:
            return StopRequest.STOP
        if self._preempted is not None and self._flags[CHECK_NODES]:
            self._checked_nodes = time.monotonic()
            before, self.deadline = self.deadline, self._preempted()
            if before is None and self.deadline is not None:
                return StopRequest.SAVE
        return StopRequest.NONE

    def _deadline_is_near(self) -> bool:
        return self.deadline is not None and self._clock() >= self.deadline - self._margin()

    def _file_exists(self, now: float) -> bool:
        if dist.get_rank() != 0 or now - self._checked_file < CHECK_FILE_EVERY:
            return False
        self._checked_file = now
        return self.file.exists()
