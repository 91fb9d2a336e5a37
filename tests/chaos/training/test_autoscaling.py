"""cluster/aws.yaml's node types under Ray's own autoscaler: a generate job brings GPU nodes from none, and they go.

The nodes are raylets of this machine with the CPUs and GPUs that the file says (Ray's provider for tests), so nothing
of a cloud is shown; what is shown is that our job's requests are those which make this file's pools grow and shrink.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from helpers.stages.generation_case import write_inputs

from pipeline.core.manifest import newest_manifest, write_manifest

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[3]
HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


def fake(cluster_file: Path, address: str) -> dict[str, Any]:
    """The file with its node types as they are and Ray's test provider instead of a cloud."""
    real = yaml.safe_load(cluster_file.read_text())
    types = {}
    for kind, node in real["available_node_types"].items():
        is_head = kind == real["head_node_type"]
        resources = dict(node["resources"], **({} if is_head else {"object_store_memory": 100_000_000}))
        types[HEAD_TYPE if is_head else kind] = {
            "resources": resources, "node_config": {},
            "min_workers": node.get("min_workers", 0), "max_workers": node.get("max_workers", 0),
        }  # fmt: skip
    commands = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    return {
        "cluster_name": "fake", "max_workers": real["max_workers"], "upscaling_speed": real["upscaling_speed"],
        "idle_timeout_minutes": 0.25,  # the file's ten minutes would only make the test longer
        "provider": {"type": "external", "module": PROVIDER, "gcs_address": address, "head_node_id": HEAD_ID,
                     "launch_multiple": True},
        "available_node_types": types, "head_node_type": HEAD_TYPE, "auth": {}, "docker": {}, "file_mounts": {},
        "cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
        **{c: [] for c in (*commands, "head_start_ray_commands", "worker_start_ray_commands")},
    }  # fmt: skip


class Autoscaled:
    """A head without CPUs whose autoscaler may start the file's nodes."""

    def __init__(self, folder: Path):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.ip = "127.0.0.1"
        self.address, self.began = f"127.0.0.1:{port}", time.monotonic()
        self.timeline: list[tuple[float, dict[str, int]]] = []
        config = folder / "fake.json"
        config.write_text(json.dumps(fake(ROOT / "cluster" / "aws.yaml", self.address)))
        self.env = {
            **os.environ, "RAY_AUTH_MODE": "disabled", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"]
        command += [f"--port={port}", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}/ray"]
        command += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
        log = (folder / "head.log").open("w")
        self.process = subprocess.Popen(
            [*command, f"--autoscaling-config={config}"], env=self.env, stdout=log, stderr=log, start_new_session=True
        )
        while not self.look():
            assert self.process.poll() is None, (folder / "head.log").read_text()[-3000:]
            assert time.monotonic() - self.began < 120, "no head"
            time.sleep(1)

    def look(self) -> dict[str, int]:
        """Living nodes by type; noted with the time where it changed."""
        from ray._raylet import GcsClient

        try:
            found = GcsClient(address=self.address).get_all_node_info(timeout=5).values()
        except Exception:
            return {}
        kinds: dict[str, int] = {}
        for node in found:
            if node.state == 0:
                kind = "head" if node.is_head_node else f"{int(node.resources_total.get('GPU', 0))} GPU"
                kinds[kind] = kinds.get(kind, 0) + 1
        if kinds and (not self.timeline or self.timeline[-1][1] != kinds):
            self.timeline.append((round(time.monotonic() - self.began, 1), kinds))
        return kinds

    def close(self) -> None:
        own = psutil.Process(self.process.pid)
        for p in [own, *own.children(recursive=True)]:
            p.kill()
        self.process.wait()


@pytest.fixture
def folder() -> Iterator[Path]:
    import shutil

    path = Path(tempfile.mkdtemp(prefix="a", dir="/tmp"))  # Ray's sockets lie in it: short
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def cluster(folder) -> Iterator[Autoscaled]:
    found = Autoscaled(folder)
    yield found
    found.close()


def test_gpu_nodes_come_for_a_generate_job_and_go_after_it(folder, cluster):
    inputs = write_inputs(folder / "models")
    for manifest in inputs.values():
        write_manifest(manifest)
    job = {
        "kind": "generate", "name": "grown", "output": str(folder / "runs"), "cluster": "cluster/aws.yaml",
        "resources": {"workers": 1, "cpus_per_worker": 8, "gpus_per_worker": 8, "actors": 2},  # a whole node each
        "inputs": {stage: m.folder for stage, m in inputs.items()},
        "cells": [{"cell_type": "T", "n_cells": 60}], "shard_size": 10,
    }  # fmt: skip
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    assert cluster.look() == {"head": 1}
    log = (folder / "driver.log").open("w")
    env = {k: v for k, v in cluster.env.items() if not k.startswith(("RAY_CLOUD", "RAY_OVERRIDE", "RAY_FAKE"))}
    driver = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(file)], env={**env, "RAY_ADDRESS": cluster.address},
        stdout=log, stderr=log,
    )  # fmt: skip
    try:
        while driver.poll() is None and time.monotonic() - cluster.began < 400:
            cluster.look()
            time.sleep(1)
    finally:
        if driver.poll() is None:
            driver.kill()
        print((folder / "driver.log").read_text()[-2500:])
        print("timeline:", *(f"\n  {t:6.1f} s  {kinds}" for t, kinds in cluster.timeline))
    done = cluster.timeline[-1][0]
    assert driver.returncode == 0
    assert newest_manifest(folder / "runs" / "grown", "generate").facts["n_cells"] == 60
    assert max(kinds.get("8 GPU", 0) for _, kinds in cluster.timeline) >= 1, "no GPU node came"
    while cluster.look() != {"head": 1}:
        assert time.monotonic() - cluster.began < 600, f"nodes stay: {cluster.timeline}"
        time.sleep(1)
    print("after:", *(f"\n  {t:6.1f} s  {kinds}" for t, kinds in cluster.timeline if t > done))
