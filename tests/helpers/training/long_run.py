"""Five thousand steps of a toy under the real loop with MLflow, by one rank that looks at itself; for test_long_run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from helpers.training.toy_training import FEED, Toy, cells
from pipeline.config.train import TrainConfig
from pipeline.data.loading.order import FeedOrder
from pipeline.tracking.tracker import StageTracker
from pipeline.training.loop import Training, run_training
from pipeline.training.state import Run
from scldm.flow.config import EMAConfig

STEPS, EVERY = 5000, 250  # of looks and of checkpoints


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    _look_every(folder / "looks.jsonl")
    base = {"max_steps": STEPS, "validate_every": EVERY, "checkpoint_every": EVERY, "keep_last": 2, "feed": FEED}
    config = TrainConfig.model_validate(base)
    source, feed = cells(), config.feed
    order = FeedOrder(source.ids, source.tile, 0, feed.batch_size, feed.lanes, feed.block_rows)
    tracker = StageTracker.attach(json.loads((folder / "tracker.json").read_text()))
    run = Run(folder, "v", "local", tracker)
    run_training(Toy(None, []), source, order, config, run, ema_config=EMAConfig(decay=0.9)).close()
    tracker.close()
    dist.destroy_process_group()


def _look_every(path: Path) -> None:
    """Memory (MB), open files and threads of this process after every so many steps."""
    take, me = Training.take, psutil.Process()

    def looked(self: Training, at: object) -> bool:
        last = take(self, at)
        if self.steps % EVERY == 0:
            found = {"step": self.steps, "rss_mb": me.memory_info().rss / 1e6}
            found |= {"files": len(os.listdir("/proc/self/fd")), "threads": me.num_threads()}
            with path.open("a") as f:
                f.write(json.dumps(found) + "\n")
        return last

    Training.take = looked  # type: ignore[method-assign]
