"""What the loop does when steps go wrong, on two workers under torchrun: one launch runs all scenarios of a toy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.training.toy_training import ODD_CELL, STEPS, toy_loss

pytestmark = pytest.mark.multiprocess
STAGES = (0, 1, 2, 3)
TESTS = Path(__file__).resolve().parents[1]


def torchrun(folder: Path, *args: str, timeout: float = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(TESTS / "helpers" / "training" / "toy_training.py"), str(folder), *args]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """The results of every scenario, for each worker."""
    folder = tmp_path_factory.mktemp("policies")
    done = torchrun(folder, "policies")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "results.json").read_text())
    found[0]["log"] = done.stdout
    return found


def assert_close(one: list[float], two: list[float], atol: float = 1e-6) -> None:
    np.testing.assert_allclose(one, two, rtol=0, atol=atol)


@pytest.mark.parametrize("name", [*(f"plain {s}" for s in STAGES), *(f"offload {s}" for s in STAGES[1:]), "options"])
def test_every_zero_stage_offloaded_or_not_trains_as_plain_torch_does(results, name):
    """Gradient clipping, accumulation over two workers, weight of repeats and schedule included."""
    assert_close(results[0][name]["weights"], results[0]["by_hand"])
    assert results[0][name]["grad_norm"] == pytest.approx(results[0]["plain 0"]["grad_norm"], rel=1e-5)


@pytest.mark.row("N1")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_cell_that_is_not_finite_on_one_worker_costs_both_that_step_and_nothing_else(results, what, stage):
    one, two = (r[f"odd {what} {stage}"] for r in results)
    assert one["skipped"] == two["skipped"] == 2, "once in each epoch"
    assert_close(one["weights"], results[0]["by_hand_without"])
    assert one["weights"] == two["weights"]
    assert np.isfinite(one["average"]).all()
    assert one["rows"][-1]["train/skipped"] == 2


@pytest.mark.row("N1", "N4")
def test_the_same_in_bf16(results):
    found = results[0]["odd loss in bf16"]
    assert found["skipped"] == 2
    assert_close(found["weights"], results[0]["by_hand_without"], atol=0.02)
    with pytest.raises(AssertionError):  # or nothing was computed in bf16
        assert_close(found["weights"], results[0]["by_hand_without"], atol=1e-5)


def test_the_log_names_step_worker_and_cell(results):
    line = next(x for x in results[0]["log"].splitlines() if "Skipped on all workers" in x)
    assert f"soma_joinid {ODD_CELL}." in line
    assert "the loss is not finite for worker" in line


@pytest.mark.row("N2")
def test_stop_and_too_many_in_a_row_end_the_run_on_all_workers_with_the_cells(results):
    for name, message in (
        ("stop", f"soma_joinid {ODD_CELL}. train.non_finite is stop"),
        ("all odd", "number 3 in a row"),
    ):
        assert message in results[0][name]["stopped"]
        assert results[0][name] == results[1][name]


def test_a_spike_is_logged_or_skipped(results):
    assert (results[0]["spike logged"]["spikes"], results[0]["spike logged"]["skipped"]) == (1, 0)
    assert (results[0]["spike left out"]["spikes"], results[0]["spike left out"]["skipped"]) == (1, 1)


@pytest.mark.row("N3")
def test_N3_gradients_a_million_times_too_large_are_clipped_and_training_goes_on(results):
    """One cell in 48, in every epoch. The loss of all others, under the weights that training came to."""
    plain, harmed = results[0]["longer"], results[0]["a million times"]
    assert harmed["skipped"] == 0
    assert np.isfinite(harmed["weights"]).all()
    start, end, reached = (toy_loss(w) for w in (results[0]["untrained"], plain["weights"], harmed["weights"]))
    assert end < 0.1 * start, "the toy does not learn, so nothing is shown"
    assert reached < 0.05 * start, f"from {start:.3g} to {reached:.3g}; without the cell to {end:.3g}"


def test_early_stopping_ends_the_run_and_exports_the_best_weights(results):
    for found in (r["early"] for r in results):
        assert (found["steps"], found["exported"], found["early"]) == (6, 5, True)
        assert_close(found["weights"], results[0]["early by hand"])
    assert "train/loss" in results[0]["early"]["rows"][-1]


def test_the_metrics_hold_where_the_time_went(results):
    row = results[0]["plain 1"]["rows"][-1]
    assert row["step"] == STEPS
    assert {"perf/data_wait_s", "perf/step_s", "perf/cells_per_s", "train/grad_norm"} <= row.keys()


@pytest.mark.row("T9")
def test_a_hanging_worker_ends_both_with_their_stacks(tmp_path):
    """Both hang: one in its step, the other waiting for the first one's gradients."""
    start = time.monotonic()
    done = torchrun(tmp_path, "hang", "6")
    assert done.returncode != 0
    assert time.monotonic() - start < 120
    reports = {p.name: p.read_text() for p in (tmp_path / "hang").glob("hang-rank*.txt")}
    assert reports, done.stderr[-2000:]
    for name, text in reports.items():  # torchrun ends the second when the first has ended
        assert f"worker {name[9]} hangs" in text
        assert "after step 2 (train.step_timeout_s 6)" in text
        assert ("sleeps" if name == "hang-rank1.txt" else "loop.py") in text
