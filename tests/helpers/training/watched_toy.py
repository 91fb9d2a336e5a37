"""Train a toy with a callback that the loop has never heard of; for tests/unit/training/test_loop.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from helpers.training.toy_training import Toy, train
from pipeline.data.loading.feed import FeedStep, feed
from pipeline.training import loop
from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.state import StepLosses, TrainingState

REFUSED, LAST = 3, 6  # steps


class Watcher(TrainingCallback):
    """Records every hook, refuses the update of a step, requests a checkpoint in the next, ends the run early."""

    state_key = "watcher"

    def __init__(self) -> None:
        self.hooks: list[str] = []
        self.restored: list[int] = []
        self.n_steps = 0

    def on_train_start(self, state: TrainingState) -> None:
        self.hooks.append(f"train start after {state.step}")

    def on_step_start(self, state: TrainingState) -> None:
        self.hooks.append(f"step start after {state.step}")

    def on_gradient_exchange(self, state: TrainingState) -> None:
        self.hooks.append("exchange")

    def accept_update(self, state: TrainingState, losses: StepLosses) -> bool:
        return state.step != REFUSED

    def on_update(self, state: TrainingState, losses: StepLosses, *, applied: bool) -> None:
        self.hooks.append("updated" if applied else "skipped")

    def on_validation_end(self, state: TrainingState) -> None:
        self.hooks.append(f"validated {state.validation['val/loss']:g}")

    def collect_metrics(self, state: TrainingState) -> dict[str, float]:
        return {"train/watched": float(self.n_steps)}

    def on_step_end(self, state: TrainingState) -> None:
        self.n_steps += 1
        if state.step == REFUSED + 1:
            state.request_checkpoint()
        if state.step == LAST:
            state.request_finish()

    def on_checkpoint(self, state: TrainingState, *, saved: bool) -> None:
        self.hooks.append(f"saved {state.step}" if saved else "not saved")

    def on_train_end(self, state: TrainingState) -> None:
        self.hooks.append("train end")

    def state_dict(self) -> dict[str, Any]:
        return {"n_steps": self.n_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.n_steps = state["n_steps"]
        self.restored.append(self.n_steps)


def lose_a_micro_batch(folder: Path) -> None:
    """Train with a feed that leaves out the first micro batch of every step, and record how that ends."""

    def shortened(*args: Any, **kwargs: Any) -> Iterator[FeedStep]:
        for step in feed(*args, **kwargs):
            yield replace(step, micro=step.micro[1:])

    loop.feed = shortened  # type: ignore[attr-defined]
    dist.init_process_group("gloo")
    try:
        train(folder / "run")
    except RuntimeError as error:
        (folder / "error").write_text(str(error))
    dist.destroy_process_group()


def score_samples(folder: Path) -> None:
    """Train with an objective that generates cells in every second validation; record the rows of the metrics log."""
    validation = Toy.validation

    def validate(self: Toy, rank: int, world_size: int) -> tuple[dict[str, float], int]:
        means = validation(self, rank, world_size)
        self.sample_scores = {"gen_w2": float(self.calls)} if self.calls % 2 else {}
        return means

    Toy.validation = validate  # type: ignore[method-assign]
    dist.init_process_group("gloo")
    rows = train(folder / "run", validate_every=2, max_steps=6)["rows"]
    (folder / "done.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def work(folder: Path) -> None:
    """Train, then resume the finished run."""
    dist.init_process_group("gloo")
    first, second = Watcher(), Watcher()
    result = train(folder / "run", callbacks=[first], checkpoint_every=100, validate_every=5)
    train(folder / "run", callbacks=[second], checkpoint_every=100, validate_every=5, max_steps=LAST)
    found = {"hooks": first.hooks, "rows": result["rows"], "steps": result["steps"], "restored": second.restored}
    (folder / "done.json").write_text(json.dumps(found))
    dist.destroy_process_group()
