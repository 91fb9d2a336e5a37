"""Train a toy for ten checkpoints with the real loop, and record every cell that it trains on.

For kills at any fault point: it takes a second, and its result can be compared bit for bit.
"""

from __future__ import annotations

import json
import resource
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from helpers.training.ranks import cells_by_step, record_cells, start, times_begun
from pipeline.core.fault_points import POINTS
from pipeline.core.faults import arm, passed
from pipeline.tracking.tracker import NullTracker

STEPS, EVERY, WORKERS = 40, 4, 2
NEVER = 1_000_000
SLOW = 0.02


class RecordingTracker(NullTracker):
    """Writes metrics to a file."""

    def __init__(self, path: Path):
        self.path = path

    def metrics(self, values: Mapping[str, float], step: int = 0, *, time_ms: int | None = None) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")


def work(folder: Path) -> None:
    """Train on one rank."""
    _train(folder, STEPS)


def two_saves(folder: Path) -> None:
    """Train for two checkpoints, both uploaded; each rank records how often it passed every fault point."""
    from pipeline.training.checkpoints.manager import CheckpointManager

    save = CheckpointManager.save

    def save_and_copy(self: Any, *args: Any, **kwargs: Any) -> bool:
        done = save(self, *args, **kwargs)
        while self.uploader is not None and self.uploader.busy():  # or a later one might take its place
            time.sleep(0.01)
        return done

    CheckpointManager.save = save_and_copy  # type: ignore[method-assign]
    arm(",".join(f"{point}:n={NEVER}:kill" for point in POINTS))
    rank = _train(folder, 2 * EVERY)
    (folder / f"passed-{rank}.json").write_text(json.dumps(passed()))


def slow_worker(folder: Path) -> None:
    """Train with a slow worker 1: each of its micro batches takes SLOW seconds more."""

    def harm(loss: Any, batch: Any, module: Any) -> Any:
        time.sleep(SLOW * dist.get_rank())
        return loss

    _train(folder, STEPS, harm)


def _train(folder: Path, steps: int, harm: Any = None) -> int:
    from helpers.training.toy_training import FEED, Toy, cells
    from pipeline.config.resources import CheckpointStorage
    from pipeline.config.train import TrainConfig
    from pipeline.data.loading.order import FeedOrder
    from pipeline.training.checkpoints.remote import Remote
    from pipeline.training.loop import run_training
    from pipeline.training.state import Run
    from scldm.optim.config import EMAConfig

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    attempt: list[Any] = [time.time_ns()]
    dist.broadcast_object_list(attempt)
    record_cells(Toy, folder / f"cells-{attempt[0]}-{rank}.jsonl")
    base = {"max_steps": steps, "validate_every": 10, "checkpoint_every": EVERY, "keep_last": 1, "feed": FEED}
    config = TrainConfig.model_validate(base)
    source, feed = cells(), config.feed
    order = FeedOrder(source.ids, source.tile, 0, feed.batch_size, feed.lanes, feed.block_rows)
    storage = CheckpointStorage(storage_path=str(folder / "second"))
    remote = Remote(storage, "toy") if rank == 0 else None
    run = Run(folder, "v", "local", RecordingTracker(folder / f"told-{rank}.jsonl"), remote=remote, storage=storage)
    trained = run_training(Toy(harm, []), source, order, config, run, ema_config=EMAConfig(decay=0.9))
    trained.close()
    if rank == 0:
        weights = torch.cat([p.detach().float().flatten() for p in trained.engine.module.parameters()])
        average = torch.cat([x.flatten() for x in trained.ema.state_dict().values()])
        done = {"weights": weights.tolist(), "average": average.tolist()}
        done["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        (folder / "done.json").write_text(json.dumps(done))
    dist.destroy_process_group()
    return rank


# ---- from outside ------------------------------------------------------------------------------------------------
def run(folder: Path, fault: str = "") -> list[int]:
    """Run one attempt and return the exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    return start(folder, work, WORKERS, fault)


def told(folder: Path) -> list[dict[str, Any]]:
    """Return what worker 0 sent to its tracker, in order."""
    return [json.loads(line) for line in (folder / "told-0.jsonl").read_text().splitlines()]


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "done.json").read_text())


def log(folder: Path) -> str:
    return (folder / "log").read_text()[-3000:]


def every_cell_once_an_epoch(folder: Path) -> tuple[int, int]:
    """Count duplicated and missing cells over the whole epochs of a run, by the attempt that did a step last."""
    from helpers.training.toy_training import BATCH, CELLS

    per_epoch, steps = CELLS // BATCH, cells_by_step(folder)
    doubled = missing = 0
    for epoch in range(STEPS // per_epoch):
        seen = Counter(c for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for c in steps[step])
        doubled += sum(n - 1 for n in seen.values())
        missing += CELLS - len(seen)
    return doubled, missing


def lost_steps(folder: Path) -> int:
    return sum(n - 1 for n in times_begun(folder).values())


def first_step_after(folder: Path, when: float) -> tuple[int, float]:
    """Return the first step that was begun after a time, and when."""
    rows = (json.loads(line) for file in folder.glob("cells-*-0.jsonl") for line in file.read_text().splitlines())
    at, step = min((row["at"], row["step"]) for row in rows if row["at"] > when)
    return step, at
