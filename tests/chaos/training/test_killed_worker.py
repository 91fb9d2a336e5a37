"""A training worker is killed under Ray: the group resumes from the last checkpoint and ends with the same weights."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from helpers.servers.recovery import Recoveries
from safetensors.torch import load_file

from pipeline.config.io.loader import load_job
from pipeline.core.manifest import newest_manifest
from pipeline.workflow.runner import run_job

pytestmark = [pytest.mark.chaos, pytest.mark.slow]  # two fits under Ray; kills at exact steps: tests/multiprocess
JOB = {
    "kind": "train_vae",
    "resources": {"workers": 2, "cpus_per_worker": 1, "actors": 1},
    "ingest": {"source": {"type": "synthetic", "n_cells": 300, "n_genes": 80, "n_types": 3}},
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 4, "latent_width": 4},
    "train": {"max_steps": 240, "checkpoint_every": 20, "validate_every": 120, "validation_cells": 32,
              "feed": {"batch_size": 32, "micro_batch_size": 16, "lanes": 4}},
}  # fmt: skip


def run(root: Path, name: str) -> Path:
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**JOB, "name": name, "output": str(root / "runs")}))
    run_job(load_job(file), file)
    return root / "runs" / name


def kill_a_worker(folder: Path, killed: list[int], recoveries: Recoveries) -> None:
    """Send SIGKILL to one training worker of this cluster, once the first checkpoint is committed."""
    while not list(folder.glob("train_vae/*/checkpoints/step-*/MANIFEST.json")):
        time.sleep(0.05)
    for process in psutil.Process().children(recursive=True):  # only what this test session started
        if any("TrainWorker" in part for part in process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
            recoveries.steps("worker", folder / "train_vae")
            return


@pytest.mark.row("T1", "T2")
def test_a_killed_worker_costs_no_step_and_changes_no_weight(tmp_path, ray_cluster, record):
    killed: list[int] = []
    recoveries = Recoveries()
    given = (tmp_path / "runs" / "killed", killed, recoveries)
    killer = threading.Thread(target=kill_a_worker, args=given, daemon=True)
    killer.start()
    broken = newest_manifest(run(tmp_path, "killed"), "train_vae")
    killer.join(timeout=5)
    assert killed, "no worker was found to kill"
    whole = newest_manifest(run(tmp_path, "whole"), "train_vae")
    assert broken.version == whole.version
    one, two = (load_file(m.path("model") / "model.safetensors") for m in (broken, whole))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0, msg=name)
    rows = [json.loads(line) for line in (Path(broken.folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in rows]
    assert steps == sorted(set(steps)), "a repeated step is logged twice"
    assert steps[-1] == 240
    record |= {"kills": 1, "recover": recoveries.seconds}
