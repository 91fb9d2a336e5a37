"""Tracking delivers every finite number, to a real SQLite store, once; without a server it costs nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path

import pytest

from pipeline.config.job import EvaluateJob, TrackingConfig
from pipeline.core.manifest import MANIFEST, Manifest, write_manifest
from pipeline.tracking import tracker as tracking_module
from pipeline.tracking.mlflow_runs.client import clean_key, clean_keys, mlflow_client
from pipeline.tracking.mlflow_runs.runs import OPENING
from pipeline.tracking.provenance import IDS, read_ids, settings_behind
from pipeline.tracking.record_log import DRIVER_LOG, WORKER_LOG, RecordLog
from pipeline.tracking.sender import NotReadyError
from pipeline.tracking.sync import sync
from pipeline.tracking.tags import lineage_tags
from pipeline.tracking.tracker import DriverTracker, NullTracker, Tracking, attach_tracker
from scldm.errors import InputError

DEAD = "http://127.0.0.1:9"


def job(uri: str | None = None) -> EvaluateJob:
    return EvaluateJob(kind="evaluate", name="demo", seed=3, tracking=TrackingConfig(uri=uri))


def stage_folder(root: Path, version: str = "0a1b2c") -> Path:
    folder = root / "demo" / "train_vae" / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("kind: evaluate\n")
    return folder


def open_stage(tracking: Tracking, folder: Path, *, max_steps: int = 3) -> DriverTracker:
    facts = {
        "digest": "d1635" * 10, "census_version": "2025-01-30", "n_cells": {"train": 90, "validation": 10, "test": 5},
        "n_genes": 7, "labels": ["cell_type"], "soma_uri": "s3://cells",
    }  # fmt: skip
    config = {"source": {"type": "census"}}
    ingest = Manifest("ingest", "feed12", "/x", config, {}, facts, 1.0, 1.0, {"run_id": "r1"})
    return tracking.stage("train_vae", folder.name, folder, {"train": {"max_steps": max_steps}}, {"ingest": ingest})


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
    tracking = Tracking(job(), store, "jobs/demo.yaml")
    tracker = open_stage(tracking, folder)
    for step in range(20):
        tracker.metrics({"train/loss": 1 / (step + 1), "bad": float("nan"), "worse": float("inf")}, step=step)
    tracker.tag("note!", "hello")
    worker = attach_tracker(json.loads(json.dumps(tracker.spec())))
    worker.metrics({"val/loss": 0.5}, step=20)
    worker.close()  # may be before the run exists: then the driver sends it at the end
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


def test_a_run_tells_its_origin_by_tags_and_note(store):
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
    (tmp_path / "train_flow" / "v" / MANIFEST).write_text("{")
    assert settings_behind({"generate": cells}) == {"generate": {"seed": 1}}, "tracking is no reason to end a job"


def test_a_rerun_continues_the_same_runs(store):
    folder = stage_folder(store)
    before = json.loads((folder / IDS).read_text())
    tracking = Tracking(job(), store)
    tracker = open_stage(tracking, folder, max_steps=4)  # a param is never changed once logged
    tracker.finish("FAILED")
    tracking.close("FAILED")
    after = json.loads((folder / IDS).read_text())
    assert (after["run_id"], after["parent_run_id"]) == (before["run_id"], before["parent_run_id"])
    found = mlflow_client(after["uri"]).get_run(after["run_id"])
    assert found.data.tags["scldm.attempt"] == "2"
    assert found.data.params == {"train.max_steps": "3"}
    assert found.info.status == "FAILED"


def test_the_next_attempt_sends_what_a_dead_server_missed(store):
    folder = stage_folder(store, "dead00")
    dead = Tracking(job(DEAD), store)
    tracker = open_stage(dead, folder)
    began = time.monotonic()
    for step in range(1000):
        tracker.metrics({"train/loss": 1.0}, step=step)
    assert time.monotonic() - began < 0.5
    tracker.finish()
    dead.close()
    assert time.monotonic() - began < 20
    assert tracker.ids() == {}

    alive = Tracking(job(), store)
    open_stage(alive, folder).finish()
    alive.close()
    assert steps(store, folder) == list(range(1000))


def test_the_driver_sends_what_a_killed_worker_left_on_disk(store):
    folder = stage_folder(store, "kill00")
    driver = Tracking(job(), store)
    tracker = open_stage(driver, folder)
    worker = RecordLog(folder / WORKER_LOG)  # what the worker wrote; it never reached the server
    worker.append({"kind": "tag", "value": {"scldm.world_size": "2"}, "at": 1})
    rows = [{"step": n, "time_ms": 1000 + n, "train/loss": 1.0 / n} for n in (10, 20, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "tra')
    tracker.finish("FAILED")
    driver.close("FAILED")
    run_id = read_ids(folder)["run_id"]
    client = mlflow_client(f"sqlite:///{store}/mlflow.db")
    history = client.get_metric_history(run_id, "train/loss")
    assert [(m.step, m.timestamp, m.value) for m in history] == [(n, 1000 + n, 1.0 / n) for n in (10, 20, 30)]
    assert client.get_run(run_id).data.tags["scldm.world_size"] == "2"


def test_a_worker_ignores_the_run_of_an_earlier_attempt_on_another_server(tmp_path):
    folder = stage_folder(tmp_path)
    (folder / IDS).write_text(json.dumps({"run_id": "0" * 32, "uri": "sqlite:///elsewhere.db"}))
    worker = attach_tracker({"folder": str(folder), "uri": f"sqlite:///{tmp_path}/mlflow.db"})
    with pytest.raises(NotReadyError):
        worker.deliver([], replay=True)
    worker.close()


def test_a_server_gets_what_cannot_be_written_to_a_full_disk(store):
    folder = stage_folder(store, "full00")
    (folder / DRIVER_LOG).mkdir()  # as unwritable as a full disk
    tracking = Tracking(job(), store)
    tracker = open_stage(tracking, folder)
    for step in range(20):
        tracker.metrics({"train/loss": 1.0}, step=step)
    tracker.finish()
    tracking.close()
    assert steps(store, folder) == list(range(20))
    run = mlflow_client(f"sqlite:///{store}/mlflow.db").get_run(read_ids(folder)["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.max_steps": "3"}


def test_a_stage_that_logs_the_same_again_leaves_its_points_once(store):
    folder = stage_folder(store, "again0")
    for _ in range(2):
        tracking = Tracking(job(), store)
        tracker = open_stage(tracking, folder)
        tracker.metrics({"encode/train_cells": 90.0}, step=0)
        tracker.finish()
        tracking.close()
    client = mlflow_client(f"sqlite:///{store}/mlflow.db")
    assert len(client.get_metric_history(read_ids(folder)["run_id"], "encode/train_cells")) == 1


def test_sync_sends_a_whole_run_to_another_store_and_nothing_the_second_time(store, tmp_path):
    folder = stage_folder(store, "dead00")
    other = f"sqlite:///{tmp_path}/other.db"
    done = sync(folder, other)
    assert [s.problem for s in done] == [""] * len(done)
    assert done[0].sent["points"] == 1000
    assert mlflow_client(other).get_run(done[0].run_id).info.status == "FINISHED"
    assert [s.sent for s in sync(folder, other)] == [{}]


def test_sync_delivers_what_version_0_1_0_left_and_removes_it(store, tmp_path):
    folder = stage_folder(store, "old000")
    tracking = Tracking(job(), store)
    open_stage(tracking, folder).finish()
    tracking.close()
    start = mlflow_client(f"sqlite:///{store}/mlflow.db").get_run(read_ids(folder)["run_id"]).info.start_time
    old = [
        {"kind": "metrics", "value": {"train/loss": 0.5}, "at": start + 5000, "step": 10},
        {"kind": "system", "value": {"system/cpu_utilization_percentage": 50.0}, "at": start + 15_000},
        {"kind": "params", "value": {"train.seed": "1"}, "at": start},
    ]
    spool = folder / ".mlflow_spool.worker.jsonl.host-17-0"
    spool.write_text("".join(json.dumps(record) + "\n" for record in old))
    other = sync(folder, f"sqlite:///{tmp_path}/other.db")
    assert other[0].problem == ""
    assert spool.exists(), "its own store has not got it"
    (done,) = sync(folder)
    assert done.sent == {"points": 2, "params": 1}
    assert "0.1.0" in done.text()
    assert spool.name in done.text()
    assert not spool.exists()
    client = mlflow_client(done.uri)
    assert [m.step for m in client.get_metric_history(done.run_id, "system/cpu_utilization_percentage")] == [15]
    assert sync(folder)[0].sent == {}


def test_sync_ends_the_run_of_a_stage_whose_driver_died_after_the_manifest(store):
    folder = stage_folder(store, "done00")
    tracking = Tracking(job(), store)
    open_stage(tracking, folder)
    tracking.close("KILLED")
    write_manifest(Manifest("train_vae", "done00", str(folder), {}, {}, {}, 1.0, 1234.5))
    (done, *_) = sync(folder)
    info = mlflow_client(done.uri).get_run(done.run_id).info
    assert (info.status, info.end_time) == ("FINISHED", 1_234_500)


def test_sync_of_a_folder_that_was_never_tracked_names_what_to_give(tmp_path):
    with pytest.raises(InputError, match="runs/demo"):
        sync(tmp_path)


def steps(store: Path, folder: Path) -> list[int]:
    client = mlflow_client(f"sqlite:///{store}/mlflow.db")
    return [m.step for m in client.get_metric_history(read_ids(folder)["run_id"], "train/loss")]


def test_a_worker_of_a_stage_that_is_not_tracked_tracks_nothing():
    worker = attach_tracker(NullTracker().spec())
    worker.metrics({"a": float("nan")}, step=1, time_ms=1)
    worker.close()
    assert isinstance(worker, NullTracker)


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (OSError(), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(), "KILLED")],
)
def test_leaving_the_context_ends_the_pipelines_run_with_the_status_of_its_job(tmp_path, monkeypatch, error, status):
    ended = []
    monkeypatch.setattr(Tracking, "close", lambda self, status: ended.append(status))
    with contextlib.suppress(BaseException), Tracking(job(DEAD), tmp_path):
        if error is not None:
            raise error
    assert ended == [status]


def test_a_stage_begins_although_its_folder_cannot_be_written(tmp_path, caplog):
    folder = tmp_path / "demo" / "train_vae" / "gone"  # as unwritable as a full disk
    tracking = Tracking(job(DEAD), tmp_path)
    tracker = open_stage(tracking, folder)
    tracker.metrics({"train/loss": 1.0}, step=1)
    tracker.finish()
    assert f"{folder / OPENING} cannot be written" in caplog.text
    assert "scldm mlflow sync" in caplog.text


def test_a_flow_names_the_run_and_the_weights_of_the_vae_that_it_was_built_on(tmp_path):
    vae = tmp_path / "train_vae"
    (vae / "model").mkdir(parents=True)
    (vae / "model" / "model.safetensors").write_bytes(b"weights")
    (vae / IDS).write_text(json.dumps({"run_id": "r2"}))
    tags = lineage_tags({"train_vae": {"version": "v1", "folder": str(vae), "model": "model"}})
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
