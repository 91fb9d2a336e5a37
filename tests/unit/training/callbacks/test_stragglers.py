"""Which worker the others wait for, from times that a test makes up; real workers: tests/chaos/test_slow_worker.py."""

from __future__ import annotations

import pytest
import torch

from pipeline.training.callbacks.stragglers import Pace, straggler

SEEN = straggler([0.1, 0.4, 0.1]) | {"perf/step_s": 1.0}


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def pace(now) -> Pace:
    return Pace(torch.device("cpu"), lambda: now[0])


def test_the_slowest_worker_is_named_with_what_the_others_wait():
    assert SEEN["perf/straggler_rank"] == 1
    assert SEEN["perf/straggler_ratio"] == pytest.approx(4)
    assert SEEN["perf/straggler_wait_s"] == pytest.approx(0.3)


def test_one_worker_waits_for_nobody_and_equal_ones_neither():
    assert straggler([0.3]) == {}
    assert straggler([0.2, 0.2])["perf/straggler_ratio"] == pytest.approx(1)
    assert straggler([0.0, 0.0])["perf/straggler_wait_s"] == 0


def test_a_workers_own_time_ends_where_the_first_gradients_begin(pace, now):
    pace.meets()  # the first step of all: nobody knows when it began
    for _ in range(10):
        pace.alone()
        now[0] += 0.4
        pace.meets()
        now[0] += 5.0  # together with the others
        pace.meets()  # a second micro batch
    assert pace.mean() == pytest.approx(0.4)
    assert pace.mean() == 0, "each look is of the steps since the last"


def test_a_line_is_said_once_until_it_is_anothers_turn_and_not_for_little(pace):
    said = pace.remark(10, SEEN)
    assert said.startswith("step 10: the others wait 0.30 s a step or more for worker 1 (4.0 times")
    assert pace.remark(20, SEEN) is None
    assert pace.remark(30, SEEN | {"perf/straggler_ratio": 1.2, "perf/straggler_rank": 0.0}) is None, "a fifth more"
    assert pace.remark(30, SEEN | {"perf/step_s": 100.0, "perf/straggler_rank": 2.0}) is None, "0.3 s of 100"
    assert "worker 0" in pace.remark(40, SEEN | {"perf/straggler_rank": 0.0})
