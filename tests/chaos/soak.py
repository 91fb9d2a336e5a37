"""Training for a while by the real command while somebody kills its workers and its driver, and MLflow comes and goes.

A cluster of two raylets on this machine; every 30 s a worker or, one time in five, the driver gets SIGKILL; the driver
is started again by the same command. All output goes to a disk that is 95 % full. The seed of all that is printed. At
the end the run is asked to stop, and every cell that a step was made of is accounted for. Goodput is the time of the
steps that count over the time of it all, start of the cluster's first worker included.

    python tests/chaos/soak.py --minutes 30 --json soak.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from soak_ledger import Ledger

from pipeline.core.manifest import newest_manifest
from pipeline.tracking.mlflow_runs.client import mlflow_client
from pipeline.tracking.provenance import read_ids
from pipeline.tracking.sync import sync
from pipeline.training.checkpoints.manifest import newest, newest_step

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from helpers.servers.full_disk import FullDisk  # noqa: E402
from helpers.servers.mlflow_server import Server  # noqa: E402
from helpers.servers.raylets import RealCluster, kill_tree, wait_for  # noqa: E402

BATCH, EVERY, DRIVER_SHARE, STOPPED = 64, 20, 0.2, 128 + signal.SIGTERM
JOB = {
    "kind": "train_vae",
    "name": "soak",
    "resources": {"workers": 2, "cpus_per_worker": 1, "actors": 1},
    "ingest": {"source": {"type": "synthetic", "n_cells": 2000, "n_genes": 200, "n_types": 3}},
    "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 4, "latent_width": 4},
    "train": {"max_steps": 10_000_000, "checkpoint_every": EVERY, "validate_every": 500, "validation_cells": 32,
              "max_failures": 1_000_000, "feed": {"batch_size": BATCH, "micro_batch_size": 32, "lanes": 4}},
}  # fmt: skip


class Soak:
    """The run under way, and all that is done to it."""

    def __init__(self, root: Path, seed: int):
        self.root, self.rng = root, random.Random(seed)
        self.disk = FullDisk(root / "disk")
        self.runs = self.disk.folder / "runs"
        self.cells, self.stage = root / "cells", self.runs / "soak" / "train_vae"
        self.cells.mkdir()
        (root / "mlflow").mkdir()
        self.kills: list[tuple[str, float]] = []
        self.peak = 0.0
        self.drivers: list[tuple[int, float, float]] = []  # pid, when, MB
        self.server = Server(root / "mlflow")
        self.server.start()
        self.job = root / "job.yaml"
        self.job.write_text(yaml.safe_dump({**JOB, "output": str(self.runs), "tracking": {"uri": self.server.uri}}))
        path = os.pathsep.join([str(HERE / "in_every_process"), str(HERE.parents[1])])
        self.cluster = RealCluster(root, {"PYTHONPATH": path, "SCLDM_SOAK_CELLS": str(self.cells)})
        self.cluster.add()
        self.began = time.time()
        self.driver = self.cluster.run(self.job)
        self._over = threading.Event()
        self._flapping = threading.Thread(target=self._flap, args=(random.Random(seed + 1),), daemon=True)
        self._flapping.start()

    # ---- what is done to it ----------------------------------------------------------------------------------------
    def shake(self, seconds: float, every: float) -> None:
        """Kills, until so many seconds have gone."""
        until, due = self.began + seconds, time.time() + every
        while (now := time.time()) < until:
            workers = self.workers()
            self.peak = max(self.peak, sum(_rss(p) for p in workers) / 1e6)
            self.drivers.append((self.driver.pid, now, _rss(psutil.Process(self.driver.pid)) / 1e6))
            assert self.driver.poll() is None, f"the driver ended by itself:\n{self.log()}"
            if now >= due and workers and newest_step_of(self.stage) > 0:
                self._kill(workers)
                due = now + every
            time.sleep(0.5)

    def _kill(self, workers: list[psutil.Process]) -> None:
        what = "driver" if self.rng.random() < DRIVER_SHARE else "worker"
        victim = self.rng.choice(sorted(workers, key=lambda p: p.pid))
        self.kills.append((what, time.time()))
        if what == "worker":
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends with the one killed before it
                victim.kill()
        else:
            kill_tree(self.driver)
            wait_for(lambda: not self.workers(), 120, "the workers outlive their driver")
            self.driver = self.cluster.run(self.job)
        print(f"{time.time() - self.began:6.0f} s  {what} killed at step {newest_step_of(self.stage)}", flush=True)

    def _flap(self, rng: random.Random) -> None:
        """MLflow is up for a minute or so, and gone for a quarter of one."""
        while not self._over.wait(rng.uniform(30, 75)):
            self.server.kill()
            self._over.wait(rng.uniform(5, 20))
            self.server.start()

    def stop(self) -> int:
        """Ask for an end; the driver's exit code."""
        self._over.set()
        wait_for(lambda: self.workers() or self.driver.poll() is not None, 300, "no workers to stop")
        self.driver.send_signal(signal.SIGTERM)
        code = self.driver.wait(timeout=300)
        self.ended = time.time()
        self._flapping.join(120)
        return code

    def close(self) -> None:
        self._over.set()
        if self.driver.poll() is None:
            kill_tree(self.driver)
        self.cluster.close()
        self._flapping.join(120)
        with contextlib.suppress(ProcessLookupError):
            self.server.kill()
        self.disk.close()

    def workers(self) -> list[psutil.Process]:
        mine = [p for n in self.cluster.nodes for p in psutil.Process(n.pid).children(recursive=True)]
        return [p for p in mine if any("TrainWorker" in part for part in _command(p))]

    def log(self) -> str:
        return (self.root / "driver.log").read_text()[-3000:]

    # ---- what came of it -------------------------------------------------------------------------------------------
    def result(self, code: int) -> dict[str, Any]:
        ledger, folder = Ledger.read(self.cells), next(self.stage.iterdir())
        found, rejected = newest(folder / "checkpoints")
        assert found is not None
        steps = found.position.step
        ingest = newest_manifest(self.runs / "soak", "ingest")
        assert ingest is not None
        n_cells = ingest.facts["n_cells"]["train"]
        doubled, missing = ledger.doubled_and_missing(steps, batch=BATCH, n_cells=n_cells)
        wall, useful = self.ended - self.began, steps * ledger.seconds_a_step()
        recover = {what: [] for what in ("worker", "driver")}  # type: dict[str, list[float]]
        for what, when in self.kills:
            if (seconds := ledger.recovered_after(when)) is not None:
                recover[what].append(seconds)
        return {
            "kills": {what: sum(w == what for w, _ in self.kills) for what in recover},
            "recover_s": {w: {"mean": statistics.mean(s), "max": max(s), "n": len(s)} for w, s in recover.items() if s},
            "steps": steps, "epochs": steps // -(-n_cells // BATCH), "lost_steps": ledger.done_again(),
            "lost_steps_a_kill": ledger.done_again() / max(1, len(self.kills)), "interval": EVERY,
            "duplicates": doubled, "missing": missing, "seconds_a_step": ledger.seconds_a_step(), "wall_s": wall,
            "goodput": useful / wall, "peak_rss_mb": self.peak, "driver": self._longest_driver(),
            "disk_full": self.disk.share, "checkpoints_given_up": self._said("CHECKPOINT FAILED"),
            "rejected_checkpoints": len(rejected),
            "mlflow_points_missing": self._points_missing(folder), "exit_code": code,
        }  # fmt: skip

    def _longest_driver(self) -> dict[str, float]:
        """Of the driver that lived longest, from its first minute on: memory, and how it grew."""
        lives: dict[int, list[tuple[float, float]]] = {}
        for pid, when, mb in self.drivers:
            lives.setdefault(pid, []).append((when, mb))
        life = max(lives.values(), key=lambda seen: seen[-1][0] - seen[0][0])
        settled = [(t, mb) for t, mb in life if t >= life[0][0] + 60] or life[-1:]
        return {"minutes": (life[-1][0] - life[0][0]) / 60, "rss_mb": settled[-1][1],
                "grown_mb": settled[-1][1] - settled[0][1]}  # fmt: skip

    def _said(self, what: str) -> int:
        return (self.root / "driver.log").read_text().count(what)

    def _points_missing(self, folder: Path) -> int:
        """Points of the curve that are not in MLflow after `scldm mlflow sync`."""
        sync(self.runs / "soak")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        wanted = {r["step"] for r in rows if "train/loss" in r}
        history = mlflow_client(self.server.uri).get_metric_history(read_ids(folder)["run_id"], "train/loss")
        return len(wanted - {m.step for m in history})


def newest_step_of(stage: Path) -> int:
    return max((newest_step(folder) for folder in stage.glob("*/")), default=0)


def _rss(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=30, help="seconds from one kill to the next")
    parser.add_argument("--seed", type=int, default=None, help="drawn and printed, if not given")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}: python tests/chaos/soak.py --minutes {args.minutes:g} --every {args.every:g} --seed {seed}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        soak = Soak(Path(root), seed)
        try:
            soak.shake(60 * args.minutes, args.every)
            found = {"seed": seed, "minutes": args.minutes, "every_s": args.every, **soak.result(soak.stop())}
        finally:
            soak.close()
    text = json.dumps(found, indent=1)
    print(text)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")
    if not found["steps"]:
        print("no step is in a checkpoint: nothing is shown")
    whole = found["steps"] and not found["duplicates"] and not found["missing"] and not found["mlflow_points_missing"]
    return 0 if whole and found["exit_code"] == STOPPED else 1


if __name__ == "__main__":
    sys.exit(main())
