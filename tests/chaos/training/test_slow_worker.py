"""One of two workers is slow for a while: training waits for it, no worker is ended, and the weights are the same."""

from __future__ import annotations

import json
import time

import pytest
from helpers.training.ranks import cells_by_step, start
from helpers.training.recorded_toy import (
    SLOW,
    STEPS,
    WORKERS,
    every_cell_once_an_epoch,
    log,
    result,
    run,
    slow_worker,
    told,
)

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
SLOW_STEPS, SECONDS = range(10, 20), 0.3


@pytest.mark.row("T10")
def test_T10_a_slow_worker_costs_its_own_time_and_nothing_else(tmp_path, record):
    times = {}
    for name, fault in (
        ("even", ""),
        ("slow", ",".join(f"training.before_step:rank=1:step={s}:sleep={SECONDS}" for s in SLOW_STEPS)),
    ):
        began = time.monotonic()
        assert run(tmp_path / name, fault) == [0] * WORKERS, log(tmp_path / name)
        times[name] = time.monotonic() - began
    even, slow = (result(tmp_path / name) for name in times)
    assert slow["weights"] == even["weights"]
    assert slow["average"] == even["average"]
    assert cells_by_step(tmp_path / "slow") == cells_by_step(tmp_path / "even")
    assert every_cell_once_an_epoch(tmp_path / "slow") == (0, 0)
    assert times["slow"] >= len(SLOW_STEPS) * SECONDS, "nobody slept"
    rows = [json.loads(line) for line in (tmp_path / "slow" / "metrics.jsonl").read_text().splitlines()]
    seen = next(r for r in rows if r["step"] == SLOW_STEPS.stop)
    assert seen["perf/straggler_rank"] == 1
    assert seen["perf/straggler_wait_s"] > 0.8 * SECONDS
    assert "s a step for worker 1" in (tmp_path / "slow" / "log").read_text()
    record |= {"lost_steps": 0, "duplicates": 0, "missing": 0, "exit_code": 0, "peak_rss_mb": slow["peak_rss_mb"]}


@pytest.mark.row("T10")
def test_T10_a_worker_that_computes_slowly_is_named_too(tmp_path):
    """Two micro batches a step: all but the last backward pass is before the first exchange of gradients."""
    assert start(tmp_path, slow_worker, WORKERS) == [0] * WORKERS, log(tmp_path)
    seen = [row for row in told(tmp_path) if "perf/straggler_rank" in row]
    assert len(seen) == STEPS // 10
    for row in seen:
        assert row["perf/straggler_rank"] == 1
        assert row["perf/straggler_wait_s"] > 0.8 * 2 * SLOW
    assert "s a step for worker 1" in log(tmp_path)
