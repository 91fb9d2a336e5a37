"""A short training that tracks as a driver and its rank 0 do, with every call timed; for tests of MLflow's faults.

As a program (`python -m helpers.training.tracked_training ROOT URI STEP up|down`) it kills itself before a step; if the
server is up, only after that has got points.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.context import Tracker
from pipeline.config.job import EvaluateJob, TrackingConfig
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.tracking import tracker as tracking
from pipeline.tracking.mlflow_runs.client import mlflow_client
from pipeline.tracking.provenance import read_ids
from pipeline.tracking.sync import sync
from pipeline.tracking.tracker import Tracking, attach_tracker

STEPS = 200
STEP_SECONDS = 0.005
MEDIAN_SECONDS = 0.002  # of a call
TYPICAL_SECONDS = 0.003  # of a call, 95 of 100, where a thread gets the processor as soon as it is awake
WORST_SECONDS = 0.5  # of any, on a machine that does other things: less than any request may take


@dataclass
class Trained:
    """What a training left, and how long its calls took."""

    folder: Path
    seconds: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)  # by how much the sleeps between the calls were longer than asked
    closing: float = 0.0

    def was_not_held_up(self) -> None:
        """Check the times of the calls, beside what this machine's other work added to a plain sleep just then."""
        times, late = sorted(self.seconds), sorted(self.late)
        assert times[len(times) // 2] < MEDIAN_SECONDS, times
        limit = TYPICAL_SECONDS + late[int(len(late) * 0.95)]
        assert times[int(len(times) * 0.95)] < limit, (limit, times[-10:])
        assert times[-1] < WORST_SECONDS, times[-5:]

    def sleep(self, seconds: float) -> None:
        """Sleep, and remember by how much too long that took."""
        began = time.perf_counter()
        time.sleep(seconds)
        self.late.append(time.perf_counter() - began - seconds)

    def steps_in(self, uri: str, key: str = "train/loss") -> list[int]:
        run_id = read_ids(self.folder)["run_id"]
        return sorted(m.step for m in mlflow_client(uri).get_metric_history(run_id, key))

    def run(self, uri: str) -> Any:
        return mlflow_client(uri).get_run(read_ids(self.folder)["run_id"])


def train(
    root: Path,
    uri: str,
    events: dict[int, Callable[[], None]] | None = None,
    *,
    lr: float = 0.1,
    version: str = "a1",
    first: int = 1,
) -> Trained:
    """Track a short training by a driver and a worker.

    Args:
        events: What happens before the steps that they name.
        first: Step at which it resumes; later steps of an earlier attempt are done again.
    """
    folder = root / "demo" / "train_vae" / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("kind: train_vae\n")
    driver = open_driver(root, uri)
    stage = driver.stage("train_vae", version, folder, {"train": {"lr": lr}}, {})
    worker = attach_tracker(stage.spec())
    cut_metrics(folder, before=first)
    worker.tag("scldm.resumed_from_step", first - 1)
    done = Trained(folder)
    for step in range(first, STEPS + 1):
        if events and step in events:
            events[step]()
        began = time.perf_counter()
        log_point(folder, worker, step)
        done.seconds.append(time.perf_counter() - began)
        done.sleep(STEP_SECONDS)
    worker.close()
    manifest = Manifest("train_vae", version, str(folder), {}, {}, {}, 1.0, time.time())
    write_manifest(manifest)
    stage.describe(manifest)
    stage.finish()
    began = time.monotonic()
    driver.close()
    done.closing = time.monotonic() - began
    return done


def log_point(folder: Path, worker: Tracker, step: int) -> None:
    """Write a point to metrics.jsonl and to the tracker, as the metrics log of a training does."""
    row, time_ms = {"train/loss": 1.0 / step, "perf/cells_per_s": 100.0 + step}, int(time.time() * 1000)
    with (folder / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": step, "time_ms": time_ms, **row}) + "\n")
    worker.metrics(row, step=step, time_ms=time_ms)


def cut_metrics(folder: Path, *, before: int) -> None:
    """Drop what an earlier attempt wrote from a step on, as a resume does."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] < before))


def open_driver(root: Path, uri: str) -> Tracking:
    return Tracking(EvaluateJob(kind="evaluate", name="demo", tracking=TrackingConfig(uri=uri)), root)


def synced(done: Trained) -> list[str]:
    """Complete the run from disk, with the patience of the command; returns the problems.

    A server that was frozen may close the connection that is used next, which is what the one retry is for.
    """
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "20"  # the fixture that shortened them puts them back
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    return [s.problem for s in sync(done.folder.parent.parent) if s.problem]


def all_is_there(done: Trained, uri: str) -> None:
    """Each point once, and the run's end."""
    assert done.steps_in(uri) == list(range(1, STEPS + 1))
    assert done.steps_in(uri, "perf/cells_per_s") == list(range(1, STEPS + 1))
    run = done.run(uri)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lr"]
    assert run.data.tags["scldm.stage"] == "train_vae"
    assert "scldm.resumed_from_step" in run.data.tags


def killed(root: Path, uri: str, step: int, *, server_up: bool) -> None:
    """Train until a step, and die."""
    folder = root / "demo" / "train_vae" / "a1"

    def wait_for_points() -> None:
        until = time.monotonic() + 60
        while not (read_ids(folder) and Trained(folder).steps_in(uri)):
            assert time.monotonic() < until
            time.sleep(0.2)

    tracking.WORKER_RETRY_SECONDS = 0.2
    events: dict[int, Callable[[], None]] = {step: lambda: os.kill(os.getpid(), signal.SIGKILL)}
    train(root, uri, {**events, step - 50: wait_for_points} if server_up else events)


if __name__ == "__main__":
    killed(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), server_up=sys.argv[4] == "up")
