"""MLflow is never in the way: whatever a real server does, a training loop goes on, and `sync` completes the run.

The rows M1 to M9 are those of the project's list of faults. A loop of many short steps tracks as rank 0 does, while the
server or a proxy before it misbehaves. Every call is timed.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from mlflow_server import Proxy, Server, free_port

from pipeline import tracking
from pipeline.job import EvaluateJob, TrackingConfig
from pipeline.mlflow_runs.client import mlflow_client
from pipeline.mlflow_runs.sync import sync
from pipeline.provenance import read_ids
from pipeline.spool import SpooledWriter
from pipeline.stage import Manifest, write_manifest
from pipeline.tracking import StageTracker, Tracking

pytestmark = pytest.mark.chaos
STEPS = 200
STEP_SECONDS = 0.005
TYPICAL_SECONDS = 0.003  # of a call, 95 of 100
WORST_SECONDS = 0.5  # of any, on a machine that does other things: less than any request may take


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("mlflow"))
    made.start()
    yield made
    made.signal(signal.SIGCONT)
    made.kill()


@pytest.fixture
def proxy(server):
    made = Proxy(server)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """The same behaviour in seconds instead of minutes."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 3.0)
    monkeypatch.setattr(tracking, "WORKER_RETRY_SECONDS", 0.2)


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
    job = EvaluateJob(kind="evaluate", name="demo", tracking=TrackingConfig(uri=uri))
    driver = Tracking.open(job, root)
    driver._writer.retry_seconds = 0.2
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


def test_M1_a_server_that_is_down_at_the_start_gets_the_whole_run_afterwards(server, tmp_path):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    began = time.time()
    done = train(tmp_path, uri)
    ended = time.time()
    done.was_not_held_up()
    assert done.closing < 4
    assert read_ids(done.folder) == {}
    assert sync(tmp_path / "demo")[0].problem  # still down: says so, loses nothing
    proxy = Proxy(server, port)
    try:
        sent = sync(tmp_path / "demo")
        assert not any(s.problem for s in sent), [s.text() for s in sent]
        all_is_there(done, uri)
        run = done.run(uri)
        assert began <= run.info.start_time / 1000 <= run.info.end_time / 1000 <= ended  # when it was, not when sent
        parent = mlflow_client(uri).get_run(run.data.tags["mlflow.parentRunId"])
        assert parent.info.status == "FINISHED"
        assert [s.sent for s in sync(tmp_path / "demo")] == [{}]  # nothing is left to send
        all_is_there(done, uri)
    finally:
        proxy.close()


def test_M2_a_server_killed_in_the_middle_and_started_again_misses_no_point(server, tmp_path):
    back = threading.Thread(target=server.start)

    def die() -> None:
        server.kill()
        back.start()

    done = train(tmp_path, server.uri, {STEPS // 2: die})
    back.join()
    done.was_not_held_up()
    assert not any(s.problem for s in sync(tmp_path / "demo"))
    all_is_there(done, server.uri)


def test_M3_a_frozen_server_holds_up_neither_the_loop_nor_its_end(server, tmp_path):
    done = train(tmp_path, server.uri, {STEPS // 2: lambda: server.signal(signal.SIGSTOP)})
    server.signal(signal.SIGCONT)
    done.was_not_held_up()
    assert done.closing < 4
    until = time.monotonic() + 10  # the threads that were given up would have ended with their processes
    while list(done.folder.glob(".mlflow_spool*")):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not any(s.problem for s in sync(tmp_path / "demo"))
    all_is_there(done, server.uri)


@pytest.mark.parametrize("mode", ["some_500", 429, "slow"])
def test_M4_errors_refusals_and_slowness_cost_no_step_and_no_point(proxy, tmp_path, mode):
    proxy.delay = 1.5  # longer than the client waits

    def set_mode(value: str | int) -> Callable[[], None]:
        return lambda: setattr(proxy, "mode", value)

    done = train(tmp_path, proxy.uri, {STEPS // 3: set_mode(mode)})
    assert mode == "slow" or {"some_500": 500}.get(mode, mode) in proxy.answered
    proxy.mode = "pass"
    done.was_not_held_up()
    assert not any(s.problem for s in sync(tmp_path / "demo"))
    all_is_there(done, proxy.uri)


@pytest.mark.parametrize(("status", "word"), [(401, "MLFLOW_TRACKING_PASSWORD"), (403, "--allowed-hosts")])
def test_M5_wrong_credentials_are_said_once_with_what_to_do(proxy, tmp_path, caplog, status, word):
    proxy.mode = status
    with caplog.at_level(logging.WARNING, "scldm.tracking"):
        done = train(tmp_path, proxy.uri)
    done.was_not_held_up()
    said = [r.getMessage() for r in caplog.records if "train_vae a1" in r.getMessage() and word in r.getMessage()]
    assert len(said) == 1
    assert "scldm mlflow sync" in said[0]
    assert "scldm doctor" in said[0]
    proxy.mode = "pass"
    assert not any(s.problem for s in sync(tmp_path / "demo"))
    all_is_there(done, proxy.uri)


def test_M5_a_deleted_run_is_named_and_gets_its_points_once_it_is_restored(server, tmp_path, caplog):
    client = mlflow_client(server.uri)

    def delete() -> None:
        until = time.monotonic() + 20
        while not (run_id := read_ids(tmp_path / "demo" / "train_vae" / "a1").get("run_id")):
            assert time.monotonic() < until, "the driver has made no run"
            time.sleep(0.05)
        client.delete_run(run_id)

    with caplog.at_level(logging.WARNING, "scldm.tracking"):
        done = train(tmp_path, server.uri, {STEPS // 2: delete})
    done.was_not_held_up()
    assert "mlflow runs restore" in caplog.text
    assert sync(tmp_path / "demo")[0].problem
    client.restore_run(read_ids(done.folder)["run_id"])
    assert not any(s.problem for s in sync(tmp_path / "demo"))
    all_is_there(done, server.uri)


def test_M6_a_resume_with_another_learning_rate_keeps_the_param_and_says_what_changed(server, tmp_path, caplog):
    train(tmp_path, server.uri, lr=0.1)
    with caplog.at_level(logging.WARNING, "scldm.tracking"):
        done = train(tmp_path, server.uri, lr=0.05)
    done.was_not_held_up()
    assert "INVALID_PARAMETER_VALUE" not in caplog.text
    assert caplog.text == ""
    run = done.run(server.uri)
    assert run.data.params["train.lr"] == "0.1"
    assert run.data.tags["scldm.changed_params"] == "train.lr 0.1 -> 0.05"
    assert run.data.tags["mlflow.note.content"].endswith("went on with other settings: train.lr 0.1 -> 0.05")
    assert run.data.tags["scldm.attempt"] == "2"
    assert done.steps_in(server.uri) == list(range(1, STEPS + 1))  # the steps that were taken twice are there once


def test_M7_a_flood_stays_bounded_and_arrives_whole(server, tmp_path):
    folder = tmp_path / "demo" / "train_vae" / "a1"
    folder.mkdir(parents=True)
    driver = Tracking.open(EvaluateJob(kind="evaluate", name="demo", tracking=TrackingConfig(uri=server.uri)), tmp_path)
    stage = driver.stage("train_vae", "a1", folder, {}, {})
    writer = SpooledWriter(capacity=40, retry_seconds=0.2)
    worker = StageTracker(folder, server.uri, writer, spool="mlflow_spool.worker.jsonl")
    n_steps, n_metrics, most, seconds = 60, 100, 0, []
    for step in range(n_steps):
        began = time.perf_counter()
        worker.metrics({f"flood/{i}": i + step for i in range(n_metrics)}, step=step)
        seconds.append(time.perf_counter() - began)
        most = max(most, writer._queue.qsize())
        time.sleep(0.02)
    worker.close()
    stage.finish()
    driver.close()
    Trained(folder, seconds).was_not_held_up()
    assert most <= 40
    assert writer.dropped == 0
    assert not any(s.problem for s in sync(tmp_path / "demo"))
    done = Trained(folder)
    for i in (0, 57, n_metrics - 1):
        assert done.steps_in(server.uri, f"flood/{i}") == list(range(n_steps))


def test_M8_odd_numbers_names_and_lengths_never_raise_and_stop_nothing(server, tmp_path):
    folder = tmp_path / "demo" / "train_vae" / "a1"
    folder.mkdir(parents=True)
    driver = Tracking.open(EvaluateJob(kind="evaluate", name="demo", tracking=TrackingConfig(uri=server.uri)), tmp_path)
    stage = driver.stage("train_vae", "a1", folder, {"long": "x" * 10_000, "odd name! (%)": 1, "a//../b": 2}, {})
    stage.metrics({"nan": math.nan, "inf": -math.inf, "huge": 1e308, "../../etc": 1.0, "CD4+ T, \u03b1\u03b2/#": 2.0})
    stage.metrics({"": 3.0, "/": 4.0, "x" * 300: 5.0, "x" * 301: 6.0, "a/./b/": 7.0})
    stage.tag("k" * 400, "v" * 20_000)
    stage.tag("empty", "")
    stage.metrics({"after": 8.0})
    stage.finish()
    driver.close()
    run = Trained(folder).run(server.uri)
    assert run.info.status == "FINISHED"
    found = run.data.metrics
    assert found["after"] == 8.0
    assert found["huge"] == 1e308
    assert found["etc"] == 1.0
    assert found["a/b"] == 7.0
    assert sorted(v for k, v in found.items() if k.startswith("xxx")) == [5.0, 6.0]
    assert "nan" not in found
    assert run.data.tags["scldm.skipped_metrics"] == "2"
    assert len(run.data.params["long"]) == 6000
    assert not list(folder.glob("*spool*"))


def test_M9_an_artifact_store_that_takes_nothing_costs_the_figures_alone_until_it_does(server, tmp_path, caplog):
    server.artifacts.mkdir(exist_ok=True)
    server.artifacts.rename(server.artifacts.with_name("aside"))
    server.artifacts.write_text("a file where the folder should be: as full as a disk can be")
    try:
        with caplog.at_level(logging.WARNING, "scldm.tracking"):
            done = train(tmp_path, server.uri)
        assert "config.yaml is not stored" in caplog.text
        done.was_not_held_up()
        assert done.steps_in(server.uri) == list(range(1, STEPS + 1))
        assert done.run(server.uri).info.status == "FINISHED"
    finally:
        server.artifacts.unlink()
        server.artifacts.with_name("aside").rename(server.artifacts)
    assert not any(s.problem for s in sync(tmp_path / "demo"))
    names = {f.path for f in mlflow_client(server.uri).list_artifacts(read_ids(done.folder)["run_id"])}
    assert {"config", "env", "manifests"} <= names
