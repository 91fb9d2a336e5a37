"""Ends a worker that hangs, so that the group starts again from its last checkpoint.

A collective that waits for a dead or stopped peer may wait for ever: Ray's own time-out did not end one in a trial, and
groups that DeepSpeed makes keep torch's default of 30 minutes. So every worker watches its own progress. A Python
thread reports which worker hangs where, writes the stacks of all threads and ends the process. Should the interpreter
itself be blocked, faulthandler's timer, which needs no interpreter lock, does the same a little later with less to
report.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.state import StepLosses, TrainingState

FIRST = 3  # times the time-out for the first step, which starts the data
GRACE_S = 10.0  # that the thread has before faulthandler's timer
EXIT_CODE = 70  # EX_SOFTWARE: Ray and torchrun take the worker for dead
log = logging.getLogger(__name__)


class Watchdog(TrainingCallback):
    """Ends the process if nothing was finished for too long. `beat` is called after everything that was waited for.

    Args:
        folder: Where hang-rank<r>.txt is written.
        rank: This worker's.
        timeout_s: The longest time between two beats, in seconds.
        clock: Returns seconds.
        end: Ends the process with an exit code.
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

    def on_train_start(self, state: TrainingState) -> None:
        self._file: TextIO = self.path.open("a")  # appends to earlier attempts' reports; a later open may fail
        self._record("the start", allowed=FIRST * self.timeout_s)
        self._thread.start()

    def on_train_end(self, state: TrainingState) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join(timeout=5)
        self._file.close()
        if self.path.exists() and not self.path.stat().st_size:
            self.path.unlink()

    def on_update(self, state: TrainingState, losses: StepLosses, *, applied: bool) -> None:
        self.beat(f"step {state.step}")

    def on_validation_end(self, state: TrainingState) -> None:
        self.beat(f"validation at step {state.step}")

    def on_checkpoint(self, state: TrainingState, *, saved: bool) -> None:
        self.beat(f"checkpoint at step {state.step}")

    def beat(self, finished: str) -> None:
        """Restart the timer.

        Args:
            finished: What was finished, for the report.
        """
        self._record(finished, allowed=self.timeout_s)

    def _record(self, finished: str, *, allowed: float) -> None:
        self._last, self._at, self._allowed = finished, self._clock(), allowed
        if self._end is os._exit:  # faulthandler cannot end the process in another way
            faulthandler.dump_traceback_later(allowed + GRACE_S, exit=True, file=self._file)

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.timeout_s / 4)):
            silent = self._clock() - self._at
            if silent > self._allowed:
                self._report_and_end(silent)
                return

    def _report_and_end(self, silent: float) -> None:
        message = (
            f"worker {self.rank} hangs: nothing finished for {silent:.0f} s after {self._last} (train.step_timeout_s "
            f"{self.timeout_s:g}); stacks in {self.path}. The worker ends, and the group restarts from the last "
            "checkpoint; raise train.step_timeout_s if a step does take this long"
        )
        self._file.write(message + "\n\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.flush()
        log.error(message)
        self._end(EXIT_CODE)
