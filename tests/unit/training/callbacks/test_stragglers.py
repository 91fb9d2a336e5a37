"""Detecting slow workers, from made-up times; with real workers: tests/chaos/training/test_slow_worker.py."""

from __future__ import annotations

import pytest
import torch

from pipeline.training.callbacks.stragglers import StragglerMonitor, straggler_metrics
from pipeline.training.state import TrainingState

SEEN = straggler_metrics([0.1, 0.4, 0.1]) | {"perf/step_s": 1.0}


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def monitor(now) -> StragglerMonitor:
    return StragglerMonitor(torch.device("cpu"), lambda: now[0])


def test_the_slowest_worker_is_reported_with_the_others_wait():
    assert SEEN["perf/straggler_rank"] == 1
    assert SEEN["perf/straggler_ratio"] == pytest.approx(4)
    assert SEEN["perf/straggler_wait_s"] == pytest.approx(0.3)


def test_one_worker_waits_for_nobody_and_neither_do_equal_ones():
    assert straggler_metrics([0.3]) == {}
    assert straggler_metrics([0.2, 0.2])["perf/straggler_ratio"] == pytest.approx(1)
    assert straggler_metrics([0.0, 0.0])["perf/straggler_wait_s"] == 0


def test_a_workers_own_time_ends_with_the_first_gradient_exchange(monitor, now):
    state = TrainingState(max_steps=10)
    monitor.on_gradient_exchange(state)  # the very first step: its start is not known
    for _ in range(10):
        monitor.on_step_end(state)
        now[0] += 0.4
        monitor.on_gradient_exchange(state)
        now[0] += 5.0  # together with the others
        monitor.on_gradient_exchange(state)  # a second micro batch
    assert monitor.take_mean() == pytest.approx(0.4)
    assert monitor.take_mean() == 0, "each call is about the steps since the last"


def test_a_straggler_is_reported_once_until_another_worker_is_slowest_and_only_if_it_matters(monitor):
    message = monitor.report(10, SEEN)
    assert message is not None
    assert all(fact in message for fact in ("step 10", "0.30 s", "worker 1", "4.0 times"))
    assert monitor.report(20, SEEN) is None
    assert monitor.report(30, SEEN | {"perf/straggler_ratio": 1.2, "perf/straggler_rank": 0.0}) is None, "a fifth more"
    assert monitor.report(30, SEEN | {"perf/step_s": 100.0, "perf/straggler_rank": 2.0}) is None, "0.3 s of 100"
    assert "worker 0" in monitor.report(40, SEEN | {"perf/straggler_rank": 0.0})
