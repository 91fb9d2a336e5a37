"""Notice to stop: a signal, a file, or a node that is about to be taken away. All workers learn of it at one step.

A worker looks at its own sources when a step begins and the answers are reduced on the CPU while the step computes, so
asking costs the step nothing and all workers stop at the same boundary.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

STOP_FILE = "stop.request"
LOOK_EVERY = 1.0  # seconds between looks at the file system
STOP, ASK = 0, 1


class StopNotice:
    """Whether the run has to stop. Build, `ask` and `answer` are collective.

    Args:
        folder: Of the stage; a file `stop.request` in it is a notice. Looked at by rank 0.
        preempted: Asks the cluster whether a node of this run is being taken away. Collective, and not free: called on
            all workers at the same step, at most every `every_seconds`.
    """

    def __init__(self, folder: Path, preempted: Callable[[], bool] | None = None, every_seconds: float = 2.0):
        self.file = folder / STOP_FILE
        self.signalled = False
        self._preempted, self._every = preempted, every_seconds
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
        self._flags[STOP] = int(self.signalled or self._file_is_there(now))
        self._flags[ASK] = int(self._preempted is not None and now - self._asked >= self._every)
        self._work = dist.all_reduce(self._flags, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def answer(self) -> bool:
        """At its end, the same on all workers."""
        assert self._work is not None
        self._work.wait()
        stop = bool(self._flags[STOP])
        if self._preempted is not None and self._flags[ASK]:
            self._asked = time.monotonic()
            stop = self._preempted() or stop
        return stop

    def _file_is_there(self, now: float) -> bool:
        if dist.get_rank() != 0 or now - self._looked < LOOK_EVERY:
            return False
        self._looked = now
        return self.file.exists()
