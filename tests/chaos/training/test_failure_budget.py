"""A worker dies at the same step each time: the run ends soon, says so, and has lost nothing that it had saved."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.core.faults import VARIABLE
from pipeline.tracking.mlflow_runs.client import mlflow_client
from pipeline.tracking.provenance import read_ids
from pipeline.training.checkpoints.manifest import newest

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[3]
EVERY, DEADLY, MAX_FAILURES = 4, 9, 1
JOB = {
    "kind": "train_vae",
    "name": "budget",
    "resources": {"workers": 2, "cpus_per_worker": 1, "actors": 1},
    "ingest": {"source": {"type": "synthetic", "n_cells": 300, "n_genes": 80, "n_types": 3}},
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 4, "latent_width": 4},
    "train": {"max_steps": 40, "checkpoint_every": EVERY, "validate_every": 20, "validation_cells": 32,
              "max_failures": MAX_FAILURES, "feed": {"batch_size": 32, "micro_batch_size": 16, "lanes": 4}},
}  # fmt: skip


@pytest.mark.row("T4")
def test_T4_a_step_that_kills_each_time_ends_the_run_after_its_budget(tmp_path, record):
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump({**JOB, "output": str(tmp_path / "runs")}))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    env[VARIABLE] = f"training.before_step:rank=1:step={DEADLY}:kill"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", str(job)],
        env=env, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - began
    assert done.returncode == 1, done.stderr[-3000:]
    assert f"workers failed {MAX_FAILURES + 1} times and train.max_failures is {MAX_FAILURES}" in done.stdout
    assert "the last time worker 1. Step 8 is in a checkpoint" in done.stdout
    assert "train_vae failed: " in done.stderr
    stage = next((tmp_path / "runs" / "budget" / "train_vae").iterdir())
    assert not (stage / "manifest.json").exists()
    assert newest(stage / "checkpoints")[0].position.step == DEADLY // EVERY * EVERY
    ids = read_ids(stage)
    assert mlflow_client(ids["uri"]).get_run(ids["run_id"]).info.status == "FAILED"
    assert seconds < 700, "it is tried again and again"
    record |= {"kills": MAX_FAILURES + 1, "exit_code": done.returncode}
