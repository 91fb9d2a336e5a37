"""A node with an actor of a generation job loses its power: the shards come out as if it had not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from helpers.servers.raylets import RealCluster, wait_for
from helpers.stages.generation_case import generate, hashes, write_inputs

from pipeline.core.faults import VARIABLE

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
ASKED = {"cells": [{"cell_type": "T", "n_cells": 150}, {"donor": "d1", "n_cells": 90}], "shard_size": 30, "seed": 3}
N_SHARDS = 8
DRIVER = """
import json, sys
from pathlib import Path
import ray
from helpers.stages.generation_case import generate
from pipeline.config.job import ResourcesConfig
from pipeline.core.manifest import Manifest
from pipeline.stages.generate import ray_pool
folder, inputs, asked = json.loads(sys.argv[1])
ray.init(address=sys.argv[2], log_to_driver=False)
def two_actors(todo, spec, context):
    context.resources = ResourcesConfig(cpus_per_worker=1, actors={"min": 2, "max": 2})
    return ray_pool(todo, spec, context)
facts = generate(Path(folder), {k: Manifest(**v) for k, v in inputs.items()}, pool=two_actors, **asked)
print("made", facts["n_cells"])
"""


def has_an_actor(node: subprocess.Popen) -> bool:
    return any("Generator" in " ".join(p.cmdline()) for p in psutil.Process(node.pid).children(recursive=True))


@pytest.mark.row("G1")
def test_a_killed_node_costs_nothing_but_time(tmp_path):
    inputs = write_inputs(tmp_path / "models")
    generate(tmp_path / "whole", inputs, **ASKED)
    folder, log = tmp_path / "run", tmp_path / "log"
    cluster = RealCluster(tmp_path)
    try:
        node = cluster.add()
        given = json.dumps([str(folder), {k: asdict(m) for k, m in inputs.items()}, ASKED])
        here = Path(__file__).resolve().parents[2]
        env = {**cluster.env, VARIABLE: "generate.after_batch:n=1:sleep=3"}  # an actor's first shard takes a moment
        env["PYTHONPATH"] += f":{here}"
        with log.open("w") as out:
            driver = subprocess.Popen(
                [sys.executable, "-c", DRIVER, given, cluster.address], env=env, stdout=out, stderr=out
            )
        wait_for(lambda: has_an_actor(node) or driver.poll() is not None, 200, "no actor on the node")
        assert driver.poll() is None, log.read_text()[-2000:]
        cluster.kill(node)
        assert len(list(folder.glob("cells/*.json"))) < N_SHARDS, "the job was over before the node was killed"
        assert driver.wait(timeout=300) == 0, log.read_text()[-3000:]
    finally:
        cluster.close()
    assert "made 240" in log.read_text()
    assert len(hashes(folder)) == N_SHARDS
    assert hashes(folder) == hashes(tmp_path / "whole")
