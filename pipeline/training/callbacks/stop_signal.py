"""Notice to stop: a signal, a file, or a node that is about to be taken away. All workers learn of it at one step.

A worker looks at its own sources when a step begins and the answers are reduced on the CPU while the step computes, so
asking costs the step nothing and all workers stop at the same boundary.

A node that is taken away at a known time is used until then: a checkpoint at once, in case the node goes early, and
another in the last moments, after which the workers end. So a notice kept costs no step, and little of the node's time.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import torch
import torch.distributed as dist

STOP_FILE = "stop.request"
LOOK_EVERY = 1.0  # seconds between looks at the file system
STOP, ASK = 0, 1
AT_ONCE = 0.0  # the time of a node that goes nobody knows when


class Notice(Enum):
    """What a step is told at its end."""

    NONE = "none"
    SAVE = "save"  # write a checkpoint now, and go on
    STOP = "stop"  # write a checkpoint, and end


class StopNotice:
    """Whether the run has to stop. Build, `ask` and `answer` are collective.

    Args:
        folder: Of the stage; a file `stop.request` in it is a notice. Looked at by rank 0.
        preempted: When (seconds since 1970) a node of this run is taken away; None if none is, AT_ONCE if nobody knows.
            Collective, with the same answer on all workers, and not free: called at most every `every_seconds`.
        margin: Seconds before that time at which to end: what a checkpoint takes, and more.
        clock: Seconds since 1970.
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
        self.goes_at: float | None = None  # a node of this run
        self._preempted, self._every, self._margin, self._clock = preempted, every_seconds, margin, clock
        self._group = dist.new_group(backend="gloo")  # its own: a flag must not wait behind gradients, nor for a device
        self._flags = torch.zeros(2, dtype=torch.int32)
        self._work: dist.Work | None = None
        self._looked = self._asked = time.monotonic()

    @contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Take SIGTERM for a notice; only a main thread can, and under Ray it is the driver that gets the signal."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "signalled", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def ask(self) -> None:
        """At the start of a step."""
        now = time.monotonic()
        self._flags[STOP] = int(self.signalled or self._node_goes() or self._file_is_there(now))
        self._flags[ASK] = int(self._preempted is not None and now - self._asked >= self._every)
        self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def answer(self) -> Notice:
        """At its end, the same on all workers."""
        assert self._work is not None
        self._work.wait()
        if self._flags[STOP]:
            return Notice.STOP
        if self._preempted is not None and self._flags[ASK]:
            self._asked = time.monotonic()
            was, self.goes_at = self.goes_at, self._preempted()
            if was is None and self.goes_at is not None:
                return Notice.SAVE
        return Notice.NONE

    def _node_goes(self) -> bool:
        return self.goes_at is not None and self._clock() >= self.goes_at - self._margin()

    def _file_is_there(self, now: float) -> bool:
        if dist.get_rank() != 0 or now - self._looked < LOOK_EVERY:
            return False
        self._looked = now
        return self.file.exists()
