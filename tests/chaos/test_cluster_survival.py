"""A cluster of real raylets on this machine loses its nodes and its driver; the same command goes on each time.

One training run, five starts of its workers: a node gives notice and goes, the driver is killed, the driver is asked to
stop, a node is killed. Weights after kills at exact steps are held elsewhere (tests/multiprocess); here it is Ray that
must follow.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.stage import newest_manifest
from pipeline.training.checkpoint import Found, committed

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
STEPS, EVERY = 1200, 50
NOTICE_S = 30
JOB = {
    "kind": "train_vae",
    "name": "survivor",
    "resources": {"workers": {"min": 1, "max": 2}, "cpus_per_worker": 1, "actors": 1},
    "ingest": {"source": {"type": "synthetic", "n_cells": 6000, "n_genes": 400, "n_types": 3}},
    "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 4, "latent_width": 4},
    "train": {"max_steps": STEPS, "checkpoint_every": EVERY, "validate_every": 200, "validation_cells": 32,
              "keep_last": 50, "feed": {"batch_size": 64, "micro_batch_size": 32, "lanes": 4}},
}  # fmt: skip
QUIET = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_raylet_start_wait_time_s": "180",
    "DS_ACCELERATOR": "cpu",
}


class RealCluster:
    """A head and further nodes, each of one CPU and a process group of its own."""

    def __init__(self, folder: Path):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.address, self.folder = f"127.0.0.1:{port}", folder
        self.env = {**os.environ, **QUIET, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        self.nodes: list[subprocess.Popen] = []
        self.add("--head", f"--port={port}", "--include-dashboard=false")

    def add(self, *how: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
        command += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
        command += how or (f"--address={self.address}",)
        log = (self.folder / "nodes.log").open("a")
        before = self.alive() if self.nodes else []
        self.nodes.append(
            subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True, cwd=self.folder)
        )
        wait_for(lambda: len(self.alive()) > len(before), 180, "the node does not join")
        return self.nodes[-1]

    def alive(self) -> list[str]:
        """Ids of the nodes that live, the head's first."""
        from ray._raylet import GcsClient

        try:
            found = GcsClient(address=self.address).get_all_node_info(timeout=5).values()
        except Exception:
            return []
        living = [n for n in found if n.state == 0]
        return [n.node_id.hex() for n in sorted(living, key=lambda n: not n.is_head_node)]

    def drain(self, node: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.address]
        command += ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run(
            [*command, "--deadline-remaining-seconds", str(NOTICE_S)], env=self.env, check=True, capture_output=True
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
        for node in self.nodes:
            kill_tree(node)


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


@pytest.fixture
def cluster(tmp_path) -> Iterator[RealCluster]:
    found = RealCluster(tmp_path)
    yield found
    found.close()


def test_nodes_and_the_driver_go_and_the_run_ends_with_every_step_done(tmp_path, cluster):
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({**JOB, "output": str(tmp_path / "runs")}))
    stage = tmp_path / "runs" / "survivor" / "train_vae"
    found = lambda: [c for f in stage.glob("*/checkpoints") for c in committed(f)]  # noqa: E731
    latest = lambda: max((c.position.step for c in found()), default=0)  # noqa: E731
    said = lambda: (tmp_path / "driver.log").read_text()  # noqa: E731

    cluster.add()
    driver = cluster.run(job)
    wait_for(lambda: latest() >= EVERY, 400, "no first checkpoint")
    cluster.drain(cluster.alive()[1])
    goes_at = time.time() + NOTICE_S
    wait_for(lambda: time.time() > goes_at, NOTICE_S + 1, "")
    cluster.kill(cluster.nodes[1])
    wait_for(lambda: "a node is taken away; step" in said(), 60, "the notice was not seen")
    safe = int(said().split("a node is taken away; step ")[1].split()[0])
    early = [c.position.step for c in found() if c.position.step % EVERY]
    assert len(early) >= 2, "one checkpoint at once and one at the last moment"
    assert max(early) == safe
    wait_for(lambda: latest() > safe, 200, "the run does not go on without the node")
    assert min((c for c in found() if c.position.step > safe), key=lambda c: c.position.step).position.world_size == 1

    kill_tree(driver)
    before = latest()
    lost = cluster.add()
    driver = cluster.run(job)
    wait_for(lambda: latest() > before, 300, "the same command does not go on")
    assert found_newest(found()).position.world_size == 2, "the new node is not used"

    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=120) == 128 + signal.SIGTERM, said()[-3000:]
    stopped = latest()
    assert f"stopped as asked; the same command goes on after step {stopped}\n" in said(), "steps were lost"
    driver = cluster.run(job)
    wait_for(lambda: latest() > stopped, 300, "the same command does not go on after a stop")

    cluster.kill(lost)
    assert driver.wait(timeout=400) == 0, said()[-3000:]
    assert found_newest(found()).position.world_size == 1, "the end was not trained by the node that is left"
    made = newest_manifest(tmp_path / "runs" / "survivor", "train_vae")
    assert made.facts["steps"] == STEPS
    rows = [json.loads(line) for line in (Path(made.folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), "a replayed step stands twice in the curve"
    assert set(range(10, STEPS + 1, 10)) <= set(steps)
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    assert losses == sorted(losses, reverse=True), "validation does not go on falling over the restarts"


def found_newest(found: list[Found]) -> Found:
    return max(found, key=lambda c: c.position.step)
