"""Seconds from a kill to the first step that is trained again: of a training worker, a node, the driver.

One small job on a cluster of three real raylets of one CPU each on this machine, two workers; each is killed with
SIGKILL, again and again, and each time the first step after it is waited for. A node that was killed is replaced
before the next kill. The driver's time runs from the same command given again. Most of it all is the start of Ray
Train's workers and their imports; the baseline is the start of the same job, from command to first step.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from harness import Row

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers.servers.raylets import RealCluster, kill_tree, wait_for

JOB = {
    "kind": "train_vae",
    "name": "recovery",
    "resources": {"workers": 2, "cpus_per_worker": 1, "actors": 1},
    "ingest": {"source": {"type": "synthetic", "n_cells": 6000, "n_genes": 400, "n_types": 3}},
    "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 4, "latent_width": 4},
    "train": {"max_steps": 1_000_000, "checkpoint_every": 20, "validate_every": 10_000, "validation_cells": 32,
              "max_failures": 100, "feed": {"batch_size": 64, "micro_batch_size": 32, "lanes": 4}},
}  # fmt: skip
MOST = 300.0  # seconds that a recovery may take


def recovery_rows(n: int) -> list[Row]:
    """Smaller is better."""
    with tempfile.TemporaryDirectory() as root:
        trial = Trial(Path(root))
        try:
            print(f"start of the job: {trial.started:.1f} s", flush=True)
            seconds: dict[str, list[float]] = {"worker": [], "driver": [], "node": []}
            kills = {"worker": trial.worker, "driver": trial.driver_, "node": trial.node}
            for what, found in seconds.items():
                for _ in range(n):
                    found.append(kills[what]())
                    print(f"{what} killed: {found[-1]:.1f} s", flush=True)  # each takes a minute: seen as it comes
        finally:
            trial.close()
    start = trial.started
    return [
        Row(f"recover_seconds_{what}", statistics.median(found), "s", start, start / statistics.median(found), n,
            (start / max(found), start / min(found)))
        for what, found in seconds.items()
    ]  # fmt: skip


class Trial:
    """The job under way."""

    def __init__(self, root: Path):
        self.job, self.stage = root / "job.yaml", root / "runs" / "recovery" / "train_vae"
        self.job.write_text(yaml.safe_dump({**JOB, "output": str(root / "runs")}))
        self.cluster = RealCluster(root)
        for _ in range(2):
            self.cluster.add()
        began = time.time()
        self.driver = self.cluster.run(self.job)
        self.started = self._step_after(began) - began

    def worker(self) -> float:
        self._checkpointed()
        os.kill(self._workers()[0].pid, signal.SIGKILL)
        return self._recovered()

    def node(self) -> float:
        self._checkpointed()
        raylets = {p.pid for w in self._workers() for p in w.parents()}
        node = next(n for n in self.cluster.nodes[1:] if n.pid in raylets)  # the head holds the driver's side too
        self.cluster.kill(node)
        seconds = self._recovered()
        self.cluster.add()
        return seconds

    def driver_(self) -> float:
        self._checkpointed()
        kill_tree(self.driver)
        wait_for(lambda: not self._workers(), 120, "the workers outlive their driver")
        began = time.time()
        self.driver = self.cluster.run(self.job)
        return self._step_after(began) - began

    def close(self) -> None:
        kill_tree(self.driver)
        self.cluster.close()

    def _workers(self) -> list[psutil.Process]:
        mine = [p for n in self.cluster.nodes for p in psutil.Process(n.pid).children(recursive=True)]
        return [p for p in mine if any("TrainWorker" in part for part in _command(p))]

    def _recovered(self) -> float:
        killed = time.time()
        return self._step_after(killed + 1) - killed  # the other worker may end the step it is in

    def _checkpointed(self) -> None:
        """Until a checkpoint is committed from now on, so that every kill costs what comes before the next."""
        now = time.time()
        newer = lambda: any(p.stat().st_mtime > now for p in self.stage.glob("*/checkpoints/step-*/MANIFEST.json"))  # noqa: E731
        wait_for(newer, MOST, "no checkpoint comes")

    def _step_after(self, when: float) -> float:
        """When the first step after a time was reported."""
        until = time.time() + MOST
        while time.time() < until:
            for path in self.stage.glob("*/progress.json"):
                try:
                    at = float(json.loads(path.read_text())["at"])
                except (OSError, ValueError):
                    continue
                if at > when:
                    return at
            time.sleep(0.05)
        raise TimeoutError(f"no step in {MOST:.0f} s: {(self.cluster.folder / 'driver.log').read_text()[-2000:]}")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
