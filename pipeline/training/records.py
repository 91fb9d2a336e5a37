"""What the loop is given and what it leaves: the records that it shares with the worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.config.resources import CheckpointStorage
from pipeline.training.checkpoints.remote import Remote
from pipeline.training.engine.deepspeed import Engine
from pipeline.training.monitoring.step_timer import StepClock
from pipeline.training.state import Memory
from scldm.optim.ema import EMA


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
