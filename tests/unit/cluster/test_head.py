"""The head on this machine and draining a node, without Ray: what is refused, written, and drained.

With Ray: tests/integration/test_cluster_jobs.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from pipeline.cluster import head
from scldm.errors import InputError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_JOB_STOP_WAIT_TIME_S"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def remembered(home, **changed) -> None:
    me = psutil.Process()
    state = {"pid": me.pid, "born": me.create_time(), "root": "/", "port": 1, "dashboard_port": 9, "log": "/tmp/x"}
    head.state_file().parent.mkdir(exist_ok=True)
    head.state_file().write_text(json.dumps(state | changed))


def test_a_token_is_made_once_and_is_its_owners():
    first = head.ensure_token()
    assert first.stat().st_mode & 0o777 == 0o600
    text = first.read_text()
    assert len(text) == 64
    assert head.ensure_token().read_text() == text


def test_the_head_gets_a_token_time_for_a_checkpoint_and_no_other_clusters_address(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    env = head.environment(None)
    assert env["RAY_AUTH_MODE"] == "token"
    assert env["RAY_JOB_STOP_WAIT_TIME_S"] == "600"
    assert env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert "RAY_ADDRESS" not in env


def test_a_port_in_use_is_named_with_its_option():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(InputError, match=f"--port={port}"):
            head.start(root=None, port=port, dashboard_port=1, temp_dir=None, arguments=[])


def test_a_pid_that_was_used_again_is_not_our_head(home):
    remembered(home)
    assert head.find().pid == os.getpid()
    remembered(home, born=psutil.Process().create_time() - 100)
    assert head.find() is None
    assert "no head runs" in head.stop(force=False)  # and this process, whose pid stands there, lives on


def test_a_process_that_ends_just_before_it_is_killed_is_no_error(home, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    remembered(home, pid=process.pid, born=psutil.Process(process.pid).create_time())
    wait = psutil.wait_procs

    def all_left(processes, timeout):
        wait(processes, timeout=timeout)
        return [], processes

    monkeypatch.setattr(psutil, "wait_procs", all_left)
    assert "stopped the head" in head.stop(force=True)
    assert not psutil.pid_exists(process.pid)
    assert not head.state_file().exists()


def test_an_unknown_state_file_is_named(home):
    remembered(home, colour="red")
    with pytest.raises(InputError, match=r"cluster\.json"):
        head.find()


# ---- draining -----------------------------------------------------------------------------------------------------
class Gcs:
    """Nodes of a cluster by address; those that were drained are gone the next time they are listed."""

    def __init__(self, *addresses: str):
        self.addresses, self.gone = addresses, set()

    def get_all_node_info(self, timeout):
        return {
            i: SimpleNamespace(
                node_id=SimpleNamespace(hex=lambda i=i: f"{i:056x}"), node_manager_address=a,
                state=1 if f"{i:056x}" in self.gone else 0,
            )
            for i, a in enumerate(self.addresses, start=1)
        }  # fmt: skip


@pytest.fixture
def gcs(monkeypatch):
    import ray
    import ray._raylet

    found = Gcs("10.0.0.1", "10.0.0.2")
    commands = []

    def run(command, **_):
        commands.append(command)
        found.gone.add(command[command.index("--node-id") + 1])

    monkeypatch.setattr(ray._raylet, "GcsClient", lambda address: found)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.2")
    monkeypatch.setattr(subprocess, "run", run)
    found.commands = commands
    return found


def test_this_node_is_drained_as_a_preemption_and_waited_for(gcs):
    assert "has left" in head.drain(address="head:6379", seconds=60)
    (command,) = gcs.commands
    assert command[command.index("--node-id") + 1] == f"{2:056x}"
    assert "DRAIN_NODE_REASON_PREEMPTION" in command
    assert command[-2:] == ["--deadline-remaining-seconds", "60"]


def test_draining_is_refused_if_the_node_is_not_unique(gcs):
    gcs.addresses = ("10.0.0.2", "10.0.0.2")
    with pytest.raises(InputError, match="2 nodes"):
        head.drain(address="head:6379", seconds=60)
    with pytest.raises(InputError, match="RAY_ADDRESS"):
        head.drain(address=None, seconds=60)
    assert gcs.commands == []
