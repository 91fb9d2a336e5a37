"""A short training that tracks as a driver and its rank 0 do, with every call timed; for tests of MLflow's faults."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.job import EvaluateJob, TrackingConfig
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.tracking.mlflow_runs.client import mlflow_client
from pipeline.tracking.provenance import read_ids
from pipeline.tracking.sync import sync
from pipeline.tracking.tracker import StageTracker, Tracking

STEPS = 200
STEP_SECONDS = 0.005
TYPICAL_SECONDS = 0.003  # of a call, 95 of 100
WORST_SECONDS = 0.5  # of any, on a machine that does other things: less than any request may take


@dataclass
class Trained:
    """What a loop left, and how long its calls took."""

    folder: Path
    seconds: list[float] = field(default_factory=list)
    closing: float = 0.0

    def was_not_held_up(self) -> None:
        times = sorted(self.seconds)
        assert times[int(len(times) * 0.95)] < TYPICAL_SECONDS, times[-10:]
        assert times[-1] < WORST_SECONDS, times[-5:]

    def steps_in(self, uri: str, key: str = "train/loss") -> list[int]:
        run_id = read_ids(self.folder)["run_id"]
        return sorted(m.step for m in mlflow_client(uri).get_metric_history(run_id, key))

    def run(self, uri: str):
        return mlflow_client(uri).get_run(read_ids(self.folder)["run_id"])


def train(
    root: Path, uri: str, events: dict[int, Callable[[], None]] | None = None, *, lr: float = 0.1, version: str = "a1"
) -> Trained:
    """A driver and a worker that track a short training; `events` happen before the steps that they name."""
    folder = root / "demo" / "train_vae" / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("kind: train_vae\n")
    driver = open_driver(root, uri)
    stage = driver.stage("train_vae", version, folder, {"train": {"lr": lr}}, {})
    worker = StageTracker.attach(stage.spec())
    done = Trained(folder)
    for step in range(1, STEPS + 1):
        if events and step in events:
            events[step]()
        values = {"train/loss": 1.0 / step, "perf/cells_per_s": 100.0 + step}
        began = time.perf_counter()
        worker.metrics(values, step=step)
        done.seconds.append(time.perf_counter() - began)
        time.sleep(STEP_SECONDS)
    worker.close()
    manifest = Manifest("train_vae", version, str(folder), {}, {}, {}, 1.0, time.time())
    write_manifest(manifest)
    stage.describe(manifest)
    stage.finish()
    began = time.monotonic()
    driver.close()
    done.closing = time.monotonic() - began
    return done


def open_driver(root: Path, uri: str) -> Tracking:
    job = EvaluateJob(kind="evaluate", name="demo", tracking=TrackingConfig(uri=uri))
    driver = Tracking.open(job, root)
    driver._writer.retry_seconds = 0.2
    return driver


def synced(done: Trained) -> list[str]:
    """Send what waits; the problems. Threads that `close` gave up would have ended with their processes."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "20"  # the fixture that shortened it puts it back
    until = time.monotonic() + 60
    while list(done.folder.glob(".mlflow_spool*")):
        assert time.monotonic() < until
        time.sleep(0.05)
    return [s.problem for s in sync(done.folder.parent.parent) if s.problem]


def all_is_there(done: Trained, uri: str) -> None:
    """Each point once, and the run's end."""
    assert done.steps_in(uri) == list(range(1, STEPS + 1))
    assert done.steps_in(uri, "perf/cells_per_s") == list(range(1, STEPS + 1))
    run = done.run(uri)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lr"]
    assert run.data.tags["scldm.stage"] == "train_vae"
    assert not list(done.folder.glob("*spool*"))
    assert not list(done.folder.glob(".*spool*"))
