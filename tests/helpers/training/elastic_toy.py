"""A toy run under every ZeRO stage, in one process per rank: straight through, and stopped and gone on elsewhere.

Phases, each with its own number of workers: `first` trains straight through and, in another folder, up to a notice;
`second` goes on up to the next notice; `third` goes on to the end.
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

SETTINGS: dict[str, dict[str, Any]] = {
    **{f"zero {stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)},
    **{f"zero {stage} in bf16": {"zero_stage": stage, "precision": "bf16"} for stage in (0, 1, 2, 3)},
    "zero 2, cautious": {"zero_stage": 2, "optimizer": {"cautious": True}},
    "zero 2, offloaded": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "zero 3, offloaded": {"zero_stage": 3, "offload_optimizer": "cpu"},
}
FIRST_STOP, SECOND_STOP = 5, 9  # steps done at the notices


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


def _train(folder: Path, settings: dict[str, Any], stop: int | None = None) -> None:
    """To the end, where rank 0 writes weights and average, or to the step at whose beginning a notice comes."""
    from helpers.training.toy_training import train
    from pipeline.training.loop import Stopped, Training

    take = Training.take

    def notified(self: Training, at: Any) -> bool:
        if stop is not None and at.step == stop - 1 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, at)

    Training.take = notified  # type: ignore[method-assign]
    try:
        done = train(folder, checkpoint_every=100, **settings)
    except Stopped as stopped:
        if stopped.step != stop:
            raise
        return
    finally:
        Training.take = take  # type: ignore[method-assign]
    assert stop is None
    if dist.get_rank() == 0:
        (folder / "done.json").write_text(json.dumps({k: done[k] for k in ("weights", "average", "curve")}))
