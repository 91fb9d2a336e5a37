"""Training on a range of workers takes nodes as they come: two nodes, then three, one is killed, and the run ends.

Raylets of this machine, each a node of one CPU. What the weights are after another number of workers is held in
tests/multiprocess; here Ray must grow the group, lose a node, and finish.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.servers.raylets import RealCluster, kill_tree, wait_for
from helpers.servers.recovery import Recoveries

from pipeline.core.manifest import newest_manifest
from pipeline.training.checkpoints.manifest import CheckpointInfo, committed

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1500)]
EVERY, PATIENCE_S = 25, 400
JOB = {
    "kind": "train_vae",
    "name": "grower",
    "resources": {"workers": {"min": 1, "max": 3}, "cpus_per_worker": 1, "actors": 1},
    "ingest": {"source": {"type": "synthetic", "n_cells": 6000, "n_genes": 400, "n_types": 3}},
    "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 4, "latent_width": 4},
    "train": {"max_steps": 1600, "checkpoint_every": EVERY, "validate_every": 600, "validation_cells": 32,
              "keep_last": 200, "feed": {"batch_size": 60, "micro_batch_size": 30, "lanes": 6}},
}  # fmt: skip


@pytest.fixture
def cluster(tmp_path) -> Iterator[RealCluster]:
    """A head and a node."""
    started = RealCluster(tmp_path)
    started.add()
    yield started
    started.close()


@pytest.mark.row("T3")
def test_the_group_grows_to_a_third_node_loses_one_and_ends(tmp_path, cluster, record):
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({**JOB, "output": str(tmp_path / "runs")}))
    stage = tmp_path / "runs" / "grower" / "train_vae"
    found = lambda: [c for f in stage.glob("*/checkpoints") for c in committed(f)]  # noqa: E731
    by_size = lambda n: [c for c in found() if c.position.world_size == n]  # noqa: E731

    recoveries = Recoveries()
    driver = cluster.run(job)
    try:
        wait_for(lambda: by_size(2), PATIENCE_S, "two nodes do not train")
        third = cluster.add()
        wait_for(lambda: by_size(3) or driver.poll() is not None, PATIENCE_S, "the node that came is not used")
        assert driver.poll() is None, "the run ended before it could grow: max_steps is too small for this machine"
        grown = newest(by_size(3)).position.step
        cluster.kill(third)
        recoveries.steps("node", stage)
        wait_for(lambda: [c for c in by_size(2) if c.position.step > grown], PATIENCE_S, "two nodes do not go on")
        assert driver.wait(timeout=900) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    finally:
        if driver.poll() is None:
            kill_tree(driver)
    made = newest_manifest(tmp_path / "runs" / "grower", "train_vae")
    assert made.facts["steps"] == JOB["train"]["max_steps"]
    assert (Path(made.folder) / "model").is_dir()
    print("steps by workers:", timeline(found()))
    record |= {"kills": 1, "recover": recoveries.seconds}


def newest(found: list[CheckpointInfo]) -> CheckpointInfo:
    return max(found, key=lambda c: c.position.step)


def timeline(found: list[CheckpointInfo]) -> list[tuple[int, int]]:
    """(step, workers) where the number of workers changed."""
    out: list[tuple[int, int]] = []
    for c in sorted(found, key=lambda c: c.position.step):
        if not out or out[-1][1] != c.position.world_size:
            out.append((c.position.step, c.position.world_size))
    return out
