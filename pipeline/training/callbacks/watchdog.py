"""Ends a worker that hangs, so that the group starts again from its last checkpoint.

A collective that waits for a dead or stopped peer may wait for ever: Ray's own time-out did not end one in a trial, and
groups that DeepSpeed makes keep torch's default of 30 minutes. So every worker watches its own clock. A Python thread
says which worker hangs where, writes the stacks of all threads and ends the process. Should the interpreter itself be
blocked, faulthandler's timer, which needs no interpreter lock, does the same a little later with less to say.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

FIRST = 3  # times the time-out for the first step, which starts the data
GRACE_S = 10.0  # that the thread has before faulthandler's timer
EXIT_CODE = 70  # EX_SOFTWARE: Ray and torchrun take the worker for dead


class Watchdog:
    """`with Watchdog(...) as watchdog: ... watchdog.beat("step 12")` after everything that was waited for.

    Args:
        folder: Where hang-rank<r>.txt goes.
        rank: This worker's.
        timeout_s: Seconds between two beats at most.
        end: What ends the process.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], None] = os._exit,
    ):
        self.path = folder / f"hang-rank{rank}.txt"
        self.rank, self.timeout_s, self._clock, self._end = rank, timeout_s, clock, end
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._file = self.path.open("a")  # beside what earlier attempts left; open now: later there may be no file
        self._beaten("the start")
        self._allowed = FIRST * self.timeout_s
        self._arm()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join(timeout=5)
        self._file.close()
        if self.path.exists() and not self.path.stat().st_size:
            self.path.unlink()

    def beat(self, done: str) -> None:
        """Something was finished."""
        self._beaten(done)
        self._allowed = self.timeout_s
        self._arm()

    def _beaten(self, done: str) -> None:
        self._last, self._at = done, self._clock()

    def _arm(self) -> None:
        if self._end is os._exit:  # faulthandler knows no other end
            faulthandler.dump_traceback_later(self._allowed + GRACE_S, exit=True, file=self._file)

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.timeout_s / 4)):
            silent = self._clock() - self._at
            if silent > self._allowed:
                self._bark(silent)
                return

    def _bark(self, silent: float) -> None:
        said = (
            f"worker {self.rank} hangs: nothing finished for {silent:.0f} s after {self._last} (train.step_timeout_s "
            f"{self.timeout_s:g}); stacks in {self.path}. The worker ends, and the group starts again from the last "
            "checkpoint; raise train.step_timeout_s if its steps do take so long"
        )
        self._file.write(said + "\n\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.flush()
        print(said, file=sys.stderr, flush=True)
        self._end(EXIT_CODE)
