"""Seconds from the kill of a training worker to the first step of the group that Ray starts in its place."""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psutil
import yaml
from harness import Row

JOB = {
    "kind": "train_vae",
    "resources": {"workers": 2, "cpus_per_worker": 1, "actors": 1},
    "ingest": {"source": {"type": "synthetic", "n_cells": 300, "n_genes": 80, "n_types": 3}},
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 4, "latent_width": 4},
    "train": {"max_steps": 400, "checkpoint_every": 20, "validate_every": 200, "validation_cells": 32,
              "feed": {"batch_size": 32, "micro_batch_size": 16, "lanes": 4}},
}  # fmt: skip


def recover_seconds(n: int) -> Row:
    """Smaller is better; the baseline is the start of the same job, from command to first step."""
    measured = [_measure() for _ in range(n)]
    recovered, started = (statistics.median(x) for x in zip(*measured, strict=True))
    ratios = [s / r for r, s in measured]
    return Row("recover_seconds_worker", recovered, "s", started, started / recovered, n, (min(ratios), max(ratios)))


def _measure() -> tuple[float, float]:
    """(from kill to first step, from command to first step)."""
    from pipeline.config_io import load_job
    from pipeline.runner import run_job

    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "job.yaml"
        file.write_text(yaml.safe_dump({**JOB, "name": "recovery", "output": f"{root}/runs"}))
        times: dict[str, float] = {"start": time.time()}
        killer = threading.Thread(target=_kill, args=(Path(root) / "runs" / "recovery", times), daemon=True)
        killer.start()
        run_job(load_job(file), file)
        killer.join(timeout=10)
    return times["recovered"] - times["killed"], times["first"] - times["start"]


def _kill(folder: Path, times: dict[str, float]) -> None:
    times["first"] = _step_after(folder, 0.0)
    while not list(folder.glob("train_vae/*/checkpoints/step-*/MANIFEST.json")):
        time.sleep(0.05)
    workers = [p for p in psutil.Process().children(recursive=True) if any("TrainWorker" in x for x in p.cmdline())]
    os.kill(workers[0].pid, signal.SIGKILL)
    times["killed"] = time.time()
    times["recovered"] = _step_after(folder, times["killed"] + 1)  # the other worker may end the step it is in


def _step_after(folder: Path, when: float) -> float:
    """When the first step after a time was reported."""
    while True:
        for path in folder.glob("train_vae/*/progress.json"):
            try:
                at = float(json.loads(path.read_text())["at"])
            except (OSError, ValueError):
                continue
            if at > when:
                return at
        time.sleep(0.05)
