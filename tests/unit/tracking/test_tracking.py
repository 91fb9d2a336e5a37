"""Tracking keeps every finite number it is given, on a real SQLite store, and costs nothing without a server."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path

import pytest

from pipeline.config.job import EvaluateJob, TrackingConfig
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.tracking import tracker as tracking_module
from pipeline.tracking.mlflow_runs.client import clean_key, clean_keys
from pipeline.tracking.provenance import IDS, lineage, read_ids, settings_behind
from pipeline.tracking.spool import SpooledWriter
from pipeline.tracking.system_metrics import node_metrics
from pipeline.tracking.tracker import SPOOL, NullTracker, StageTracker, Tracking, mlflow_client

DEAD = "http://127.0.0.1:9"


def job(uri: str | None = None) -> EvaluateJob:
    return EvaluateJob(kind="evaluate", name="demo", seed=3, tracking=TrackingConfig(uri=uri))


def stage_folder(root: Path, version: str = "0a1b2c") -> Path:
    folder = root / "demo" / "train_vae" / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("kind: evaluate\n")
    return folder


def open_stage(tracking: Tracking, folder: Path) -> StageTracker:
    facts = {
        "digest": "d1635" * 10, "census_version": "2025-01-30", "n_cells": {"train": 90, "validation": 10, "test": 5},
        "n_genes": 7, "labels": ["cell_type"], "soma_uri": "s3://cells",
    }  # fmt: skip
    config = {"source": {"type": "census"}}
    ingest = Manifest("ingest", "feed12", "/x", config, {}, facts, 1.0, 1.0, {"run_id": "r1"})
    return tracking.stage("train_vae", folder.name, folder, {"train": {"max_steps": 3}}, {"ingest": ingest})


@pytest.fixture(scope="module", autouse=True)
def patience():
    """To import mlflow and to make a database takes seconds, and half a minute where others use the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking_module, "CLOSE_SECONDS", 90.0)
        yield


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


def test_a_run_says_where_it_comes_from(store):
    """Needs the run of the test before."""
    ids = read_ids(stage_folder(store))
    client = mlflow_client(f"sqlite:///{store}/mlflow.db")
    run = client.get_run(ids["run_id"])
    tags = run.data.tags
    assert run.info.run_name == "train_vae-demo-0a1b2c-s3"
    assert tags["scldm.data_digest"] == "d1635" * 10
    assert tags["scldm.census_version"] == "2025-01-30"
    assert {"scldm.code_version", "scldm.torch_version", "scldm.config_hash", "scldm.output_uri"} <= set(tags)
    note = tags["mlflow.note.content"].split("\n\n")
    assert len(note) == 5
    assert f"[ingest](#/experiments/{ids['experiment_id']}/runs/r1)" in note[1]
    assert "`d1635d1635d1`, Census 2025-01-30" in note[2]
    files = {f.path for d in ("config", "env") for f in client.list_artifacts(ids["run_id"], d)}
    assert files == {"config/config.yaml", "env/packages.txt"}


def test_the_data_sets_of_a_run_are_described_and_not_read(store):
    """Needs the run of the first test."""
    run = mlflow_client(f"sqlite:///{store}/mlflow.db").get_run(read_ids(stage_folder(store))["run_id"])
    found = {x.tags[0].value: x.dataset for x in run.inputs.dataset_inputs}
    assert set(found) == {"train", "validation"}
    assert found["train"].name == "demo/train"
    assert found["train"].digest == "d1635d1635d1635d"
    assert found["train"].source_type == "census"
    assert json.loads(found["train"].profile) == {"num_rows": 90, "num_elements": 630}
    assert json.loads(found["validation"].source)["soma_uri"] == "s3://cells"


def test_an_evaluation_carries_the_settings_of_all_that_it_was_made_from(tmp_path):
    def made(stage: str, config: dict, inputs: dict[str, str]) -> Manifest:
        folder = tmp_path / stage / "v"
        folder.mkdir(parents=True)
        manifest = Manifest(stage, "v", str(folder), config, inputs, {}, 1.0, 1.0)
        write_manifest(manifest)
        return manifest

    made("train_flow", {"train": {"max_steps": 7}}, {})
    cells = made("generate", {"seed": 1}, {"train_flow": "v"})
    assert settings_behind({"generate": cells}) == {"generate": {"seed": 1}, "train_flow": {"train": {"max_steps": 7}}}


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

    def spools(self):
        return []

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


def test_a_flow_names_the_run_and_the_weights_of_the_vae_that_it_was_built_on(tmp_path):
    vae = tmp_path / "train_vae"
    (vae / "model").mkdir(parents=True)
    (vae / "model" / "model.safetensors").write_bytes(b"weights")
    (vae / IDS).write_text(json.dumps({"run_id": "r2"}))
    tags = lineage({"train_vae": {"version": "v1", "folder": str(vae), "model": "model"}})
    assert tags["scldm.vae_run_id"] == "r2"
    assert tags["scldm.vae_ckpt_sha256"] == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.parametrize(
    ("given", "key"),
    [("a/b c", "a/b c"), ("CD4+, T", "CD4__ T"), ("../x", "x"), ("a//./b/", "a/b"), ("/", "_"), ("", "_")],
)
def test_keys_fit_mlflow(given, key):
    assert clean_key(given) == key


def test_keys_that_would_become_one_stay_apart():
    assert sorted(clean_keys({"CD4+": 1, "CD4?": 2}).values()) == [1, 2]
    keys = {clean_key("x" * 300 + end) for end in "ab"}
    assert {len(k) for k in keys} == {250}
    assert len(keys) == 2


def test_a_machine_is_sampled_through_the_tracker(tmp_path):
    class Told(NullTracker):
        def __init__(self):
            self.values = []

        def system(self, values):
            self.values.append(values)

    tracker = Told()
    with node_metrics({"folder": str(tmp_path), "uri": DEAD}, tracker, rank=0, interval=0.05):
        time.sleep(0.5)
    n = len(tracker.values)
    assert n >= 3
    assert 0 <= tracker.values[0]["system/cpu_utilization_percentage"] <= 100
    assert tracker.values[0]["system/system_memory_usage_megabytes"] > 100
    time.sleep(0.2)
    assert len(tracker.values) == n  # it ends with the training


def test_one_process_of_a_machine_samples_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    before = threading.active_count()
    with node_metrics({"folder": str(tmp_path), "uri": DEAD}, NullTracker(), rank=3):
        assert threading.active_count() == before
