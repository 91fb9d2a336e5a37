"""A Ray cluster of real raylets on this machine, each in a process group of its own, so that one can lose its power."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

TRIES = 3
QUIET = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_raylet_start_wait_time_s": "180",
    "DS_ACCELERATOR": "cpu",
}


class RealCluster:
    """A head and further nodes, each of one CPU and a process group of its own.

    Args:
        folder: For logs.
        more: Of the environment of nodes and drivers.
        head: Further options of the head.
    """

    def __init__(self, folder: Path, more: Mapping[str, str] | None = None, *, head: Sequence[str] = ()):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.address, self.folder = f"127.0.0.1:{port}", folder
        self.env = {**os.environ, **QUIET, "PYTHONPATH": str(Path(__file__).resolve().parents[3]), **(more or {})}
        self.nodes: list[subprocess.Popen] = []
        self.add("--head", f"--port={port}", "--include-dashboard=false", *head)

    def add(self, *how: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
        command += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
        command += how or (f"--address={self.address}",)
        before = set(self.alive()) if self.nodes else set()  # one that was killed may still be among them
        for _ in range(TRIES):  # on a loaded machine a raylet gives up on its own agent
            node = self._start(command)
            wait_for(lambda: node.poll() is not None or set(self.alive()) - before, 200, "the node does not join")  # noqa: B023
            if node.poll() is None:
                self.nodes.append(node)
                return node
            kill_group(node)
        raise AssertionError(f"the node does not start: {(self.folder / 'nodes.log').read_text()[-2000:]}")

    def _start(self, command: list[str]) -> subprocess.Popen:
        log = (self.folder / "nodes.log").open("a")
        return subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True, cwd=self.folder)

    def alive(self) -> list[str]:
        """Ids of the nodes that live, the head's first."""
        from ray._raylet import GcsClient

        try:
            found = GcsClient(address=self.address).get_all_node_info(timeout=5).values()
        except Exception:
            return []
        living = [n for n in found if n.state == 0]
        return [n.node_id.hex() for n in sorted(living, key=lambda n: not n.is_head_node)]

    def drain(self, node: str, seconds: int) -> None:
        """As a cloud does it: the node goes in so many seconds, and nobody stops it before."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.address]
        command += ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run(
            [*command, "--deadline-remaining-seconds", str(seconds)], env=self.env, check=True, capture_output=True
        )

    def kill(self, node: subprocess.Popen) -> None:
        """As when the machine loses power: the raylet and all that it started."""
        kill_tree(node)
        self.nodes.remove(node)

    def run(self, job: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "pipeline", "run", str(job)]
        log = (self.folder / "driver.log").open("a")
        env = {**self.env, "RAY_ADDRESS": self.address}
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def close(self) -> None:
        """All nodes lose power at once."""
        for node in self.nodes:
            kill_tree(node)
        self.nodes = []


def kill_group(process: subprocess.Popen) -> None:
    """What a process left behind in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_tree(process: subprocess.Popen) -> None:
    own = psutil.Process(process.pid)
    for p in [own, *own.children(recursive=True)]:
        p.kill()
    process.wait()


def wait_for(true: Callable[[], object], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.1)
