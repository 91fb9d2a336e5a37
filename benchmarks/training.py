"""What training that survives costs: our loop over a bare one, checkpoints, recovery, a second worker.

The Dentate Gyrus preset (128 wide, 128 latent tokens) on 2,000 genes instead of 17,002 and 16 cells a step, so that it
runs on a CPU; cells in memory. `loop_vs_bare_loop` takes turns in one process: our loop under DeepSpeed with its feed,
guards, watchdog and curve, against ten lines of torch on the same batches, ready-made. Step times are medians, from the
start of one step to the start of the next, so checkpoints and start-up are outside. `checkpoint_share` is a checkpoint
in percent of the 200 steps between two (the default). `scaling_2_workers` is two processes over one at the same global
batch, a thread each. `recover_seconds_…`: recovery.py.

    python benchmarks/training.py --json benchmarks/results/training.json
    python benchmarks/training.py --only recovery --kills 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import Row, report
from recovery import recovery_rows
from torch import Tensor, nn
from training_cells import MemoryCells, make_cells

from pipeline.config.train import VaeTrainConfig
from pipeline.data.loading.feed import feed
from pipeline.data.loading.order import FeedOrder
from pipeline.tracking.tracker import NullTracker
from pipeline.training.callbacks.step_timer import StepTimer
from pipeline.training.loop import run_training
from pipeline.training.objectives.base import MicroBatchIndex
from pipeline.training.objectives.vae import VaeObjective
from pipeline.training.state import Run
from scldm.api.presets import preset
from scldm.nn.vae import VAE

BATCH, LANES, DEFAULT_INTERVAL = 16, 2, 200
SIZES = {"full": (2000, 400), "quick": (200, 60)}  # genes, expressed genes of a cell


class Timed(VaeObjective):
    """Notes when every micro batch begins."""

    begun: list[float]

    def loss(self, model: Callable[..., Tensor], batch: Any, index: MicroBatchIndex) -> Tensor:
        self.begun.append(time.perf_counter())
        return super().loss(model, batch, index)


def build(size: str) -> tuple[VAE, MemoryCells]:
    n_genes, expressed = SIZES[size]
    torch.manual_seed(0)
    recipe = preset("dentate_gyrus").vae
    assert recipe is not None
    return VAE(recipe.model, n_genes=n_genes), make_cells(256, n_genes=n_genes, expressed=expressed)


def objective(vae: VAE, n_genes: int) -> Timed:
    timed = Timed(
        vae, labels=[], mean_counts=torch.ones(n_genes), genes_per_step=None, max_genes=None, seed=0, validation=[]
    )
    timed.begun = []
    timed.validation = lambda rank, world_size: ({"loss": 0.0}, 1)  # type: ignore[method-assign]
    return timed


def settings(steps: int) -> VaeTrainConfig:
    feed_ = {"batch_size": BATCH, "micro_batch_size": BATCH, "lanes": LANES, "block_rows": 64}
    every = {"validate_every": steps, "checkpoint_every": steps}
    return VaeTrainConfig.model_validate({"max_steps": steps, "feed": feed_, **every})


def our_loop(size: str, steps: int, folder: Path) -> tuple[list[float], float]:
    """Seconds of each step, and of a checkpoint. The folder is the same one for all workers, and new."""
    vae, source = build(size)
    timed, config = objective(vae, vae.n_genes), settings(steps)
    order = FeedOrder(source.ids, source.tile, 0, BATCH, LANES, config.feed.block_rows)
    trained = run_training(timed, source, order, config, Run(folder, "v", "local", NullTracker()))
    trained.close()
    # The time of the last checkpoint would be logged with the next row, which does not come.
    timer = next(c for c in trained.callbacks if isinstance(c, StepTimer))
    return _differences(timed.begun), timer.take()["perf/checkpoint_s"]


def bare_loop(size: str, steps: int) -> list[float]:
    """The same steps in plain torch, on batches that were made before."""
    vae, source = build(size)
    config = settings(steps)
    order = FeedOrder(source.ids, source.tile, 0, BATCH, LANES, config.feed.block_rows)
    timed, begun = objective(vae, vae.n_genes), []
    steps_ = feed(
        source, order, rank=0, world_size=1, start_step=0, stop_step=steps, micro_batch_size=BATCH, engine="local"
    )
    batches = [timed.prepare(at.micro[0], MicroBatchIndex(0, 0, 0)) for at in steps_]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4, fused=True)
    for batch in batches:
        begun.append(time.perf_counter())
        optimizer.zero_grad()
        vae(batch.cells).mean().backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 10.0)
        optimizer.step()
    return _differences(begun)


def _differences(begun: list[float]) -> list[float]:
    return [b - a for a, b in pairwise(begun[2:])]  # the first two warm up


# ---- rows --------------------------------------------------------------------------------------------------------
def loop_rows(size: str, steps: int, rounds: int) -> list[Row]:
    ours, bare, ratios, saves = [], [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            mine, seconds = our_loop(size, steps, Path(folder))
        other = bare_loop(size, steps)
        ours, bare = ours + mine, bare + other
        ratios.append(statistics.median(other) / statistics.median(mine))
        saves.append(seconds)
    step, plain = statistics.median(ours), statistics.median(bare)
    share = [100 * s / (DEFAULT_INTERVAL * step) for s in saves]
    value = statistics.median(share)
    return [
        Row("loop_vs_bare_loop", BATCH / step, "cells/s", BATCH / plain, plain / step, rounds,
            (min(ratios), max(ratios))),
        Row("checkpoint_share", value, "% of 200 steps", 100.0, 1 - value / 100, rounds,
            (1 - max(share) / 100, 1 - min(share) / 100)),
    ]  # fmt: skip


def scaling_row(size: str, steps: int, rounds: int) -> Row:
    one, two, ratios = [], [], []
    for _ in range(rounds):
        a, b = _in_processes(1, size, steps), _in_processes(2, size, steps)
        one, two = [*one, a], [*two, b]
        ratios.append(a / b)
    first, second = statistics.median(one), statistics.median(two)
    value, base = BATCH / second, BATCH / first
    return Row("scaling_2_workers", value, "cells/s", base, value / base, rounds, (min(ratios), max(ratios)))


def _in_processes(n: int, size: str, steps: int) -> float:
    """Median step of n workers under torchrun, a thread each."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", __file__]
        command += ["--worker", str(out), size, str(steps)]
        root = str(Path(__file__).resolve().parents[1])
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root})
        return float(out.read_text())


def worker(out: str, size: str, steps: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    seconds, _ = our_loop(size, int(steps), Path(out).parent)
    if dist.get_rank() == 0:
        Path(out).write_text(str(statistics.median(seconds)))
    dist.destroy_process_group()


def step_rows(size: str, steps: int, rounds: int, *, scaling_rounds: int) -> list[Row]:
    """Rows of the loop alone, in this process and under torchrun."""
    scaling = scaling_row(size, steps, scaling_rounds)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        rows = loop_rows(size, steps, rounds)
        dist.destroy_process_group()
    return [*rows, scaling]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="small model, few steps, no Ray: does it run at all")
    parser.add_argument("--kills", type=int, default=5, help="of each kind")
    parser.add_argument("--only", choices=("steps", "recovery"), help="steps need no Ray and six minutes")
    parser.add_argument("--worker", nargs=3, metavar=("OUT", "SIZE", "STEPS"), help="used by itself")
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if args.worker:
        return worker(*args.worker)
    size, steps, rounds = ("quick", 8, 2) if args.quick else ("full", 24, 5)
    rows: list[Row] = []
    if args.only != "recovery":
        rows += step_rows(size, steps, rounds, scaling_rounds=1 if args.quick else 3)
        report(rows, None)  # what follows takes long: seen before it
    absent = {}
    if args.quick or args.only == "steps":
        why = "not with --quick or --only steps: needs a Ray cluster"
        absent = {f"recover_seconds_{x}": why for x in ("worker", "node", "driver")}
    else:
        rows += recovery_rows(args.kills)
    report(rows, args.json, absent=absent, size=dict(zip(("n_genes", "expressed"), SIZES[size], strict=True)))
    print(json.dumps({"absent": absent}, indent=1))
    return None


if __name__ == "__main__":
    main()
