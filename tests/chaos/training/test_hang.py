"""A training worker freezes under Ray: its peers report where they wait, and the group restarts."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from helpers.servers.recovery import Recoveries

from pipeline.config.io.loader import load_job
from pipeline.core.manifest import newest_manifest
from pipeline.workflow.runner import run_job

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
STEPS, TIMEOUT = 160, 40  # a loaded machine may take half a minute to its first step
JOB = {
    "kind": "train_vae",
    "resources": {"workers": 2, "cpus_per_worker": 1, "actors": 1},
    "ingest": {"source": {"type": "synthetic", "n_cells": 300, "n_genes": 80, "n_types": 3}},
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 4, "latent_width": 4},
    "train": {"max_steps": STEPS, "checkpoint_every": 20, "validate_every": 80, "validation_cells": 32,
              "step_timeout_s": TIMEOUT, "feed": {"batch_size": 32, "micro_batch_size": 16, "lanes": 4}},
}  # fmt: skip


def freeze_a_worker(folder: Path, frozen: dict[int, float], recoveries: Recoveries) -> None:
    """SIGSTOP, which no watchdog of the worker's own survives, once the first checkpoint is committed."""
    while not list(folder.glob("train_vae/*/checkpoints/step-*/MANIFEST.json")):
        time.sleep(0.05)
    for process in psutil.Process().children(recursive=True):  # only what this test session started
        if any("TrainWorker" in part for part in process.cmdline()):
            os.kill(process.pid, signal.SIGSTOP)
            frozen[process.pid] = time.time()
            recoveries.steps(f"frozen worker (step_timeout_s {TIMEOUT})", folder / "train_vae")
            return


@pytest.mark.row("T9")
def test_a_frozen_worker_is_given_up_and_training_ends(tmp_path, ray_cluster, record):
    file, folder, frozen = tmp_path / "job.yaml", tmp_path / "runs" / "frozen", {}
    file.write_text(yaml.safe_dump({**JOB, "name": "frozen", "output": str(tmp_path / "runs")}))
    recoveries = Recoveries()
    thread = threading.Thread(target=freeze_a_worker, args=(folder, frozen, recoveries), daemon=True)
    thread.start()
    run_job(load_job(file), file)
    thread.join(timeout=5)
    made = newest_manifest(folder, "train_vae")
    assert frozen, "no worker was found to freeze"
    assert made.facts["steps"] == STEPS
    reports = list(Path(made.folder).glob("hang-rank*.txt"))
    assert len(reports) == 1, "the frozen one cannot write; its peer does"
    assert f"train.step_timeout_s {TIMEOUT}" in reports[0].read_text()
    detected = reports[0].stat().st_mtime - min(frozen.values())
    assert detected < TIMEOUT + 20
    record |= {"kills": 1, "detect_s": detected}
    record |= {"recover": recoveries.seconds}
    for pid in frozen:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
