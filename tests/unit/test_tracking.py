"""Tracking keeps every finite number it is given, on a real SQLite store, and costs nothing without a server."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pipeline.job import EvaluateJob, TrackingConfig
from pipeline.spool import SpooledWriter
from pipeline.stage import Manifest
from pipeline.tracking import IDS, SPOOL, NullTracker, StageTracker, Tracking, mlflow_client

DEAD = "http://127.0.0.1:9"


def job(uri: str | None = None) -> EvaluateJob:
    return EvaluateJob(kind="evaluate", name="demo", tracking=TrackingConfig(uri=uri))


def stage_folder(root: Path, version: str = "0a1b2c") -> Path:
    folder = root / "demo" / "train_vae" / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("kind: evaluate\n")
    return folder


def open_stage(tracking: Tracking, folder: Path) -> StageTracker:
    ingest = Manifest("ingest", "feed12", "/x", {}, {}, {}, 1.0, 1.0, {"run_id": "r1"})
    return tracking.stage("train_vae", folder.name, folder, {"train": {"max_steps": 3}}, {"ingest": ingest})


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """One root for the module: creating the database takes seconds."""
    return tmp_path_factory.mktemp("root")


def test_a_stage_is_a_child_of_its_pipeline_with_params_metrics_tags_and_artifacts(store):
    folder = stage_folder(store)
    tracking = Tracking.open(job(), store, "jobs/demo.yaml")
    tracker = open_stage(tracking, folder)
    for step in range(20):
        tracker.metrics({"train/loss": 1 / (step + 1), "bad": float("nan"), "worse": float("inf")}, step=step)
    tracker.tag("note!", "hello")
    worker = StageTracker.attach(json.loads(json.dumps(tracker.spec())))
    worker.metrics({"val/loss": 0.5}, step=20)
    worker.close()  # may be before the run exists: then it waits in the spool
    tracker.finish()
    tracking.close()

    client = mlflow_client(f"sqlite:///{store}/mlflow.db")
    ids = json.loads((folder / IDS).read_text())
    found = client.get_run(ids["run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.params == {"train.max_steps": "3"}
    assert len(client.get_metric_history(ids["run_id"], "train/loss")) == 20
    assert set(found.data.metrics) == {"train/loss", "val/loss"}
    tags = found.data.tags
    assert tags["mlflow.parentRunId"] == ids["parent_run_id"]
    assert (tags["scldm.stage"], tags["scldm.ingest_version"], tags["scldm.ingest_run_id"]) == (
        "train_vae",
        "feed12",
        "r1",
    )
    assert tags["scldm.skipped_metrics"] == "40"
    assert tags["note_"] == "hello"
    assert list((store / "mlartifacts").rglob("config.yaml"))
    assert client.get_run(ids["parent_run_id"]).info.status == "FINISHED"
    assert tracker.ids()["run_id"] == ids["run_id"]
    assert not (folder / SPOOL).exists()


def test_a_rerun_continues_the_same_runs(store):
    folder = stage_folder(store)
    before = json.loads((folder / IDS).read_text())
    tracking = Tracking.open(job(), store)
    tracker = open_stage(tracking, folder)
    tracker.params({"train": {"max_steps": 4}})  # never changed once logged
    tracker.finish("FAILED")
    tracking.close("FAILED")
    after = json.loads((folder / IDS).read_text())
    assert (after["run_id"], after["parent_run_id"]) == (before["run_id"], before["parent_run_id"])
    found = mlflow_client(after["uri"]).get_run(after["run_id"])
    assert found.data.tags["scldm.attempt"] == "2"
    assert found.data.params == {"train.max_steps": "3"}
    assert found.info.status == "FAILED"


def test_what_a_dead_server_missed_arrives_later(store):
    folder = stage_folder(store, "dead00")
    dead = Tracking.open(job(DEAD), store)
    tracker = open_stage(dead, folder)
    began = time.monotonic()
    for step in range(1000):
        tracker.metrics({"train/loss": 1.0}, step=step)
    assert time.monotonic() - began < 0.5
    tracker.finish()
    dead.close()
    assert time.monotonic() - began < 20
    spooled = [json.loads(line) for line in (folder / SPOOL).read_text().splitlines()]
    assert sum(r["kind"] == "metrics" for r in spooled) == 1000
    assert tracker.ids() == {}

    alive = Tracking.open(job(), store)
    open_stage(alive, folder).finish()
    alive.close()
    assert not (folder / SPOOL).exists()
    ids = json.loads((folder / IDS).read_text())
    assert len(mlflow_client(ids["uri"]).get_metric_history(ids["run_id"], "train/loss")) == 1000


class Stuck:
    """A service that accepts and never answers."""

    def __init__(self, folder: Path) -> None:
        self.name, self.spool = "stuck", folder / SPOOL

    def send(self, records):
        time.sleep(60)


def test_a_server_that_never_answers_holds_nobody_up(tmp_path):
    writer = SpooledWriter(capacity=100)
    target = Stuck(tmp_path)
    began = time.monotonic()
    for i in range(50):
        writer.put(target, {"kind": "metrics", "value": i})
    writer.close(seconds=0.5)
    assert time.monotonic() - began < 2
    spooled = [json.loads(line)["value"] for line in (tmp_path / SPOOL).read_text().splitlines()]
    assert sorted(spooled) == list(range(50))


def test_a_flood_is_bounded_and_counted(tmp_path):
    writer = SpooledWriter(capacity=10)
    target = Stuck(tmp_path)
    for i in range(500):
        writer.put(target, {"kind": "metrics", "value": i})
    assert 400 < writer.dropped < 500
    writer.close(seconds=0.1)


def test_the_null_tracker_has_the_same_methods():
    null = NullTracker()
    null.params({"a": 1})
    null.metrics({"a": float("nan")}, step=1)
    null.finish("FAILED")
    assert isinstance(StageTracker.attach(null.spec()), NullTracker)
