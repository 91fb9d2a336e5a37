"""What the loop remembers beside weights and position: the part of a checkpoint that is plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.config.resources import CheckpointStorage
from pipeline.training.callbacks.early_stopping import BestSoFar
from pipeline.training.callbacks.step_guard import StepGuard
from pipeline.training.callbacks.step_timer import StepClock
from pipeline.training.checkpoints.remote import Remote
from pipeline.training.engine.deepspeed import Engine
from scldm.optim.ema import EMA


class MeanLoss:
    """Mean loss per cell of the steps since the last `take`; NaN if there was none."""

    def __init__(self) -> None:
        self.total, self.cells = 0.0, 0

    def add(self, total: float, cells: int) -> None:
        """Losses over all workers' cells, and how many these are."""
        self.total, self.cells = self.total + total, self.cells + cells

    def take(self) -> float:
        mean = self.total / self.cells if self.cells else math.nan
        self.total, self.cells = 0.0, 0
        return mean


@dataclass
class Memory:
    """Restored on resume, so that a run that goes on logs, skips and stops as the uninterrupted one."""

    guard: StepGuard
    best: BestSoFar
    losses: MeanLoss  # towards the next point of the curve

    def state(self) -> dict[str, Any]:
        losses = {"total": self.losses.total, "cells": self.losses.cells}
        return {"guard": self.guard.state(), "best": self.best.state(), "losses": losses}

    def load(self, state: Mapping[str, Any]) -> None:
        self.guard.load(state["guard"])
        self.best.load(state["best"])
        self.losses.add(state["losses"]["total"], state["losses"]["cells"])


@dataclass(frozen=True)
class Run:
    """Where and for whom the loop works."""

    folder: Path  # of the stage
    config_hash: str
    feed_engine: Literal["ray", "local"]
    tracker: Any
    on_checkpoint: Callable[[dict[str, float]], None] = lambda metrics: None
    remote: Remote | None = None  # second place of the checkpoints
    storage: CheckpointStorage = field(default_factory=CheckpointStorage)
    flops_per_cell: float | None = None  # of a forward pass
    preempted: Callable[[], float | None] | None = None  # when a node of the run is taken away; see StopNotice


class Stopped(Exception):
    """Training ended on notice, with everything up to `step` in a checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped on notice after step {step}; the same command goes on from there")
        self.step = step


@dataclass
class Trained:
    """What the loop leaves behind."""

    engine: Engine
    ema: EMA | None
    checkpoint: Path  # of these weights
    metrics: dict[str, float]
    memory: Memory
    close: Callable[[], None]  # waits for what is still under way; called when the model is exported
    clock: StepClock  # what it counted since the last point of the curve
    steps: int  # taken in all
    exported: int  # the step of these weights
