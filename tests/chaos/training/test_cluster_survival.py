"""A cluster of real raylets on this machine loses its nodes and its driver; the same command goes on each time.

One training run, six starts of its workers: a node gives notice and goes; the whole cluster is lost, with its head and
the driver; the driver is asked to stop; it is killed; a node is killed. Weights after kills at exact steps are held
elsewhere (tests/multiprocess); here it is Ray that must follow.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from helpers.servers.raylets import RealCluster, kill_tree, wait_for
from helpers.servers.recovery import Recoveries

from pipeline.core.logs import STOPPED
from pipeline.core.manifest import newest_manifest
from pipeline.training.checkpoints.manifest import CheckpointInfo, committed

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1500)]
STEPS, EVERY = 900, 50
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


@pytest.fixture
def clusters(tmp_path) -> Iterator[Callable[[], RealCluster]]:
    """Starts a cluster: a head, so far alone."""
    started: list[RealCluster] = []

    def start() -> RealCluster:
        started.append(RealCluster(tmp_path))
        return started[-1]

    yield start
    for cluster in started:
        cluster.close()


@pytest.mark.row("T3", "T5", "T6", "T7", "T8", "C4")
def test_nodes_and_the_driver_go_and_the_run_ends_with_every_step_done(tmp_path, clusters, record):
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({**JOB, "output": str(tmp_path / "runs")}))
    stage = tmp_path / "runs" / "survivor" / "train_vae"
    found = lambda: [c for f in stage.glob("*/checkpoints") for c in committed(f)]  # noqa: E731
    latest = lambda: max((c.position.step for c in found()), default=0)  # noqa: E731
    said = lambda: (tmp_path / "driver.log").read_text()  # noqa: E731

    recoveries = Recoveries()
    cluster = clusters()
    cluster.add()
    driver = cluster.run(job)
    wait_for(lambda: latest() >= EVERY, 400, "no first checkpoint")
    cluster.drain(cluster.alive()[1], NOTICE_S)
    goes_at = time.time() + NOTICE_S
    wait_for(lambda: time.time() > goes_at, NOTICE_S + 1, "")
    cluster.kill(cluster.nodes[1])
    gone = time.time()
    wait_for(lambda: "a node is taken away; step" in said(), 60, "the preemption was not seen")
    safe = int(said().split("a node is taken away; step ")[1].split()[0])
    early = [c.position.step for c in found() if c.position.step % EVERY]
    assert len(early) >= 2, "one checkpoint immediately and one at the last moment"
    assert max(early) == safe
    recoveries.steps("node, after its notice", stage, gone)
    wait_for(lambda: latest() > safe, 200, "the run does not go on without the node")
    assert min((c for c in found() if c.position.step > safe), key=lambda c: c.position.step).position.world_size == 1

    kill_tree(driver)
    cluster.close()
    gone, before = time.time(), latest()
    spoiled = spoil_rays_own_records(stage)
    cluster = clusters()
    lost = cluster.add()
    driver = cluster.run(job)
    recoveries.steps("head, all nodes and the driver (a new cluster included)", stage, gone)
    wait_for(lambda: latest() > before, 300, "the same command does not go on in a new cluster")
    assert found_newest(found()).position.world_size == 2, "the new node is not used"

    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=120) == 128 + signal.SIGTERM, said()[-3000:]
    stopped = latest()
    assert f"{STOPPED}; the same command resumes after step {stopped}\n" in said(), "steps were lost"
    gone = time.time()
    driver = cluster.run(job)
    recoveries.steps("driver that was asked to stop (from the same command on)", stage, gone)
    wait_for(lambda: latest() > stopped, 300, "the same command does not go on after a stop")

    kill_tree(driver)
    gone = time.time()
    wait_for(lambda: not training_workers(cluster), 60, "orphans: workers outlive their driver")
    recoveries.seconds["workers after their driver, to their end"] = [round(time.time() - gone, 1)]
    driver = cluster.run(job)
    recoveries.steps("driver", stage, gone)

    cluster.kill(lost)
    recoveries.steps("node", stage)
    assert driver.wait(timeout=600) == 0, said()[-3000:]
    assert found_newest(found()).position.world_size == 1, "the end was not trained by the node that is left"
    made = newest_manifest(tmp_path / "runs" / "survivor", "train_vae")
    assert made.facts["steps"] == STEPS
    rows = [json.loads(line) for line in (Path(made.folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)), "a replayed step stands twice in the curve"
    assert set(range(10, STEPS + 1, 10)) <= set(steps)
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    assert losses == sorted(losses, reverse=True), "validation does not go on falling over the restarts"
    assert spoiled >= 2, "Ray keeps no folder of an attempt any more: row C4 shows nothing"
    record |= {"kills": 4, "recover": recoveries.seconds}


def spoil_rays_own_records(stage: Path) -> int:
    """Half a snapshot where Ray Train looks for one of each attempt, its mark gone; how many attempts there were."""
    attempts = list(stage.glob("*/ray/*/"))
    for folder in attempts:
        (folder / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "1.0", "checkpoint_')
        (folder / ".validate_storage_marker").unlink(missing_ok=True)
    return len(attempts)


def training_workers(cluster: RealCluster) -> list[psutil.Process]:
    found = []
    for node in cluster.nodes:
        for process in psutil.Process(node.pid).children(recursive=True):
            with suppress(psutil.Error):
                if any("TrainWorker" in part for part in process.cmdline()):
                    found.append(process)
    return found


def found_newest(found: list[CheckpointInfo]) -> CheckpointInfo:
    return max(found, key=lambda c: c.position.step)
