"""Train a toy under every ZeRO stage, in one process per rank: straight through, and stopped and resumed elsewhere.

Phases, each with its own number of workers: `first` trains straight through and, in another folder, up to a stop
signal; `second` resumes and trains to the next signal; `third` resumes and trains to the end.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.state import Stopped, TrainingState

SETTINGS: dict[str, dict[str, Any]] = {
    **{f"zero {stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)},
    **{f"zero {stage} in bf16": {"zero_stage": stage, "precision": "bf16"} for stage in (0, 1, 2, 3)},
    "zero 2, cautious": {"zero_stage": 2, "optimizer": {"cautious": True}},
    "zero 2, offloaded": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "zero 3, offloaded": {"zero_stage": 3, "offload_optimizer": "cpu"},
}
FIRST_STOP, SECOND_STOP = 5, 9  # steps done at the signals


def first(folder: Path) -> None:
    def work(name: str, settings: dict[str, Any]) -> None:
        _train(folder / name / "straight", settings)
        _train(folder / name / "bent", settings, stop=FIRST_STOP)

    _each(folder, work)


def second(folder: Path) -> None:
    _each(folder, lambda name, settings: _train(folder / name / "bent", settings, stop=SECOND_STOP))


def third(folder: Path) -> None:
    _each(folder, lambda name, settings: _train(folder / name / "bent", settings))


def again(folder: Path) -> None:
    """From the last checkpoint of `first`, with as many workers as wrote it, to the end."""
    _each(folder, lambda name, settings: _train(folder / name / "bent", settings))


def _each(folder: Path, work: Callable[[str, dict[str, Any]], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, settings in SETTINGS.items():
        work(name, settings)
    dist.destroy_process_group()


class SignalAt(TrainingCallback):
    """Sends SIGTERM to the last rank's process, so that the run stops at the end of step `stop`."""

    def __init__(self, stop: int):
        self.stop = stop

    def on_step_end(self, state: TrainingState) -> None:
        if state.step == self.stop - 1 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _train(folder: Path, settings: dict[str, Any], stop: int | None = None) -> None:
    """Train to the end, where rank 0 writes weights and average, or to a signal that stops the run at a step."""
    from helpers.training.toy_training import train

    try:
        done = train(folder, callbacks=[] if stop is None else [SignalAt(stop)], checkpoint_every=100, **settings)
    except Stopped as stopped:
        if stopped.step != stop:
            raise
        return
    assert stop is None
    if dist.get_rank() == 0:
        (folder / "done.json").write_text(json.dumps({k: done[k] for k in ("weights", "average", "curve")}))
