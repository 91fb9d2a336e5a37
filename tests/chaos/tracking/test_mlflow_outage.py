"""Whatever a real MLflow server does, a training loop goes on, and `sync` completes the run from what is on disk.

Rows M1 to M5 of the project's list of faults: a server, or a proxy before it, is down, killed, frozen, slow, refuses.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.servers.mlflow_server import Proxy, free_port
from helpers.training.tracked_training import STEPS, Trained, all_is_there, synced, train

from pipeline.tracking.mlflow_runs.client import mlflow_client
from pipeline.tracking.provenance import read_ids
from pipeline.tracking.sync import sync

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("patience")]


@pytest.mark.row("M1")
def test_M1_a_server_that_is_down_at_the_start_gets_the_whole_run_afterwards(server, tmp_path):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    began = time.time()
    done = train(tmp_path, uri)
    ended = time.time()
    done.was_not_held_up()
    assert read_ids(done.folder) == {}
    assert synced(done)  # still down: says so, loses nothing
    proxy = Proxy(server, port)
    try:
        assert synced(done) == []
        all_is_there(done, uri)
        run = done.run(uri)
        assert began <= run.info.start_time / 1000 <= run.info.end_time / 1000 <= ended  # when it was, not when sent
        parent = mlflow_client(uri).get_run(run.data.tags["mlflow.parentRunId"])
        assert parent.info.status == "FINISHED"
        assert [s.sent for s in sync(tmp_path / "demo")] == [{}]  # nothing is left to send
        all_is_there(done, uri)
    finally:
        proxy.close()


@pytest.mark.row("M2")
def test_M2_a_server_killed_in_the_middle_and_started_again_misses_no_point(server, tmp_path):
    back = threading.Thread(target=server.start)

    def die() -> None:
        server.kill()
        back.start()

    done = train(tmp_path, server.uri, {STEPS // 2: die})
    back.join()
    done.was_not_held_up()
    assert synced(done) == []
    all_is_there(done, server.uri)


@pytest.mark.row("M3")
def test_M3_a_frozen_server_holds_up_neither_the_loop_nor_its_end(server, tmp_path, impatient):
    done = train(tmp_path, server.uri, {STEPS // 2: lambda: server.signal(signal.SIGSTOP)})
    server.signal(signal.SIGCONT)
    done.was_not_held_up()
    assert done.closing < impatient + 2
    assert synced(done) == []
    all_is_there(done, server.uri)


@pytest.mark.row("M4")
@pytest.mark.parametrize("mode", ["some_500", 429, "slow"])
def test_M4_errors_refusals_and_slowness_cost_no_step_and_no_point(proxy, tmp_path, mode, impatient):
    proxy.delay = 1.5  # longer than the client waits

    def set_mode(value: str | int) -> Callable[[], None]:
        return lambda: setattr(proxy, "mode", value)

    done = train(tmp_path, proxy.uri, {STEPS // 3: set_mode(mode)})
    assert mode == "slow" or {"some_500": 500}.get(mode, mode) in proxy.answered
    proxy.mode = "pass"
    done.was_not_held_up()
    assert synced(done) == []
    all_is_there(done, proxy.uri)


@pytest.mark.row("M5")
@pytest.mark.parametrize(("status", "word"), [(401, "MLFLOW_TRACKING_PASSWORD"), (403, "--allowed-hosts")])
def test_M5_wrong_credentials_are_reported_once_with_how_to_fix_them(proxy, tmp_path, caplog, status, word):
    proxy.mode = status
    with caplog.at_level(logging.WARNING, "pipeline.tracking"):
        done = train(tmp_path, proxy.uri)
    done.was_not_held_up()
    messages = [r.getMessage() for r in caplog.records if "train_vae a1" in r.getMessage() and word in r.getMessage()]
    assert len(messages) == 1
    assert "scldm mlflow sync" in messages[0]
    assert "scldm doctor" in messages[0]
    proxy.mode = "pass"
    assert synced(done) == []
    all_is_there(done, proxy.uri)


@pytest.mark.row("M5")
def test_M5_a_deleted_run_is_named_and_gets_its_points_once_it_is_restored(server, tmp_path, caplog):
    client = mlflow_client(server.uri)

    def delete() -> None:
        until = time.monotonic() + 20
        while not (run_id := read_ids(tmp_path / "demo" / "train_vae" / "a1").get("run_id")):
            assert time.monotonic() < until, "the driver has made no run"
            time.sleep(0.05)
        client.delete_run(run_id)

    with caplog.at_level(logging.WARNING, "pipeline.tracking"):
        done = train(tmp_path, server.uri, {STEPS // 2: delete})
    done.was_not_held_up()
    assert "mlflow runs restore" in caplog.text
    assert "mlflow runs restore" in synced(done)[0]
    client.restore_run(read_ids(done.folder)["run_id"])
    assert synced(done) == []
    all_is_there(done, server.uri)


def killed_training(root: Path, uri: str, *, up: bool) -> Trained:
    """A driver and its worker that are killed before step 150."""
    command = [sys.executable, "-m", "helpers.training.tracked_training", str(root), uri, "150", "up" if up else "down"]
    here = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    return Trained(root / "demo" / "train_vae" / "a1")


@pytest.mark.row("M2")
@pytest.mark.parametrize("up", [True, False], ids=["server up", "server down"])
def test_M2_a_killed_driver_and_its_next_attempt_leave_each_point_once(server, tmp_path, up):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    proxy = Proxy(server, port) if up else None
    try:
        killed_training(tmp_path, uri, up=up)
        proxy = proxy or Proxy(server, port)
        done = train(tmp_path, uri, first=101)  # steps 101 to 149 are done again
        done.was_not_held_up()
        assert synced(done) == []
        all_is_there(done, uri)
        assert done.run(uri).data.tags["scldm.resumed_from_step"] == "100"
    finally:
        if proxy is not None:
            proxy.close()


@pytest.mark.row("M2")
def test_M2_a_killed_training_is_completed_by_sync_alone_and_is_still_running(server, tmp_path):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    done = killed_training(tmp_path, uri, up=False)
    proxy = Proxy(server, port)
    try:
        assert synced(done) == []
        assert done.steps_in(uri) == list(range(1, 150))
        assert done.run(uri).info.status == "RUNNING"
    finally:
        proxy.close()
