"""Train a toy for five thousand steps with MLflow, by one rank that measures itself; for test_long_run."""

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
from pipeline.tracking.tracker import attach_tracker
from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.loop import run_training
from pipeline.training.state import Run, TrainingState
from scldm.optim.config import EMAConfig

STEPS, EVERY = 5000, 250  # of looks and of checkpoints


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    base = {"max_steps": STEPS, "validate_every": EVERY, "checkpoint_every": EVERY, "keep_last": 2, "feed": FEED}
    config = TrainConfig.model_validate(base)
    source, feed = cells(), config.feed
    order = FeedOrder(source.ids, source.tile, 0, feed.batch_size, feed.lanes, feed.block_rows)
    tracker = attach_tracker(json.loads((folder / "tracker.json").read_text()))
    run = Run(folder, "v", "local", tracker)
    usage = ResourceUsage(folder / "looks.jsonl")
    run_training(Toy(None, []), source, order, config, run, ema_config=EMAConfig(decay=0.9), callbacks=[usage]).close()
    tracker.close()
    dist.destroy_process_group()


class ResourceUsage(TrainingCallback):
    """Records memory (MB), open files and threads of this process every EVERY steps."""

    def __init__(self, path: Path):
        self.path, self.process = path, psutil.Process()

    def on_step_end(self, state: TrainingState) -> None:
        if state.step % EVERY == 0:
            row = {"step": state.step, "rss_mb": self.process.memory_info().rss / 1e6}
            row |= {"files": len(os.listdir("/proc/self/fd")), "threads": self.process.num_threads()}
            with self.path.open("a") as f:
                f.write(json.dumps(row) + "\n")
