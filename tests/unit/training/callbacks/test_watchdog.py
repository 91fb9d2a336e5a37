"""A worker that makes no progress for too long is ended, with a report of where it hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.training.callbacks.watchdog import EXIT_CODE, FIRST, Watchdog
from pipeline.training.state import TrainingState


@contextmanager
def started(watchdog: Watchdog) -> Iterator[Watchdog]:
    state = TrainingState(max_steps=100)
    watchdog.on_train_start(state)
    try:
        yield watchdog
    finally:
        watchdog.on_train_end(state)


class Ended(threading.Event):
    code: int | None = None

    def __call__(self, code: int) -> None:
        self.code = code
        self.set()


def test_silence_after_a_step_ends_the_process_with_a_report(tmp_path, caplog):
    ended = Ended()
    with started(Watchdog(tmp_path, rank=3, timeout_s=0.1, end=ended)) as watchdog:
        watchdog.beat("step 12")
        assert ended.wait(5)
        report = (tmp_path / "hang-rank3.txt").read_text()
    assert ended.code == EXIT_CODE
    assert "worker 3 hangs" in report
    assert "after step 12" in report
    assert "test_silence_after_a_step" in report, "the stacks of all threads are in the report"
    assert "train.step_timeout_s 0.1" in caplog.text


def test_steps_that_finish_in_time_leave_no_report(tmp_path):
    ended = Ended()
    with started(Watchdog(tmp_path, rank=0, timeout_s=0.4, end=ended)) as watchdog:
        for i in range(6):
            time.sleep(0.1)
            watchdog.beat(f"step {i}")
    assert not ended.is_set()
    assert not list(tmp_path.iterdir())


def test_the_first_step_may_take_longer(tmp_path):
    now, ended = [0.0], Ended()
    with started(Watchdog(tmp_path, rank=0, timeout_s=0.1, clock=lambda: now[0], end=ended)) as watchdog:
        now[0] = 0.1 * FIRST - 0.01
        assert not ended.wait(0.3)
        watchdog.beat("step 1")
        now[0] += 0.11
        assert ended.wait(5)
