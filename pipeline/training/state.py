"""What the training loop, its callbacks and its callers share: the run, its state, the losses of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.context import Tracker
from pipeline.config.resources import CheckpointStorage
from pipeline.training.checkpoints.remote import Remote

NAMED = 8  # cells that a message names, per worker


@dataclass(frozen=True)
class Run:
    """Where a run keeps its files and to whom it reports.

    Args:
        folder: The stage's folder.
        config_hash: The stage's version; a checkpoint of another one is refused.
        on_checkpoint: Called on every rank with step and metrics after a checkpoint was committed.
        remote: The remote storage of checkpoints; rank 0 only.
        flops_per_cell: Operations of a forward pass, for the utilisation of the device.
        preempted: When a node of the run is taken away; see `StopSignal`.
    """

    folder: Path
    config_hash: str
    feed_engine: Literal["ray", "local"]
    tracker: Tracker
    on_checkpoint: Callable[[dict[str, float]], None] = lambda metrics: None
    remote: Remote | None = None
    storage: CheckpointStorage = field(default_factory=CheckpointStorage)
    flops_per_cell: float | None = None
    preempted: Callable[[], float | None] | None = None


@dataclass
class TrainingState:
    """The state of a run, read by callbacks at every hook. Callbacks steer the loop through its three requests.

    A request must be made on all ranks or on none: what follows from it is collective.
    """

    max_steps: int
    step: int = 0  # steps done
    lr: float = 0.0  # of the current step
    metrics: dict[str, float] = field(default_factory=dict)  # the latest value of each; some on rank 0 only
    validation: dict[str, float] = field(default_factory=dict)  # measured at this very step; empty if it was not
    resumed_from: int | None = None  # step of the checkpoint that the run was resumed from
    rejected_checkpoints: int = 0  # newer checkpoints that did not verify
    checkpoint_requested: bool = False
    stop_requested: bool = False
    finish_requested: bool = False

    @property
    def is_last(self) -> bool:
        """Whether no step follows this one."""
        return self.step == self.max_steps or self.finish_requested

    @property
    def is_interrupted(self) -> bool:
        """Whether the run ends here though steps are left."""
        return self.stop_requested and not self.is_last

    def request_checkpoint(self) -> None:
        """Save a checkpoint at the end of this step."""
        self.checkpoint_requested = True

    def request_stop(self) -> None:
        """Save a checkpoint at the end of this step and interrupt the run: the loop raises `Stopped`."""
        self.stop_requested = True

    def request_finish(self) -> None:
        """Make this step the last one, and the run a finished one."""
        self.finish_requested = True

    def begin_step(self, step: int, lr: float) -> None:
        """Advance to a step.

        Args:
            step: Steps done at its end.
            lr: The step's learning rate.
        """
        self.step, self.lr, self.validation = step, lr, {}
        self.checkpoint_requested = False


class StepLosses:
    """Losses of one worker's cells in a step, gathered over its micro batches.

    Args:
        device: Where the losses are.
        n_cells: Cells of the global batch, without repeats.

    Attributes:
        total: Sum over all workers' cells, after `reduce`.
        n_non_finite: How many of all workers' losses are not finite, after `reduce`.
    """

    def __init__(self, device: torch.device, n_cells: int):
        self.device, self.n_cells = device, n_cells
        self.total, self.n_non_finite = 0.0, 0
        self._losses: list[Tensor] = []  # (b,) each
        self._joinids: list[Tensor] = []
        self._weights: list[Tensor] = []

    @property
    def mean(self) -> float:
        """Mean loss per cell, over all workers."""
        return self.total / self.n_cells

    def add(self, loss: Tensor, weight: Tensor, joinids: Tensor) -> None:
        """Add a micro batch; all arguments have the shape (b,)."""
        self._losses.append(loss.detach())
        self._weights.append(weight)
        self._joinids.append(joinids)

    def reduce(self) -> None:
        """Set `total` and `n_non_finite` from all workers' cells. Collective."""
        loss, weight = torch.cat(self._losses).double(), torch.cat(self._weights)
        bad = ~loss.isfinite()
        sums = torch.stack([(loss * weight).sum(), bad.sum().double()])
        dist.all_reduce(sums)
        total, n_bad = sums.tolist()
        self.total, self.n_non_finite = total, int(n_bad)

    def describe_cells(self) -> str:
        """Name the cells whose loss is not finite, by worker; all cells if every loss is finite. Collective."""
        loss, ids = torch.cat(self._losses).cpu(), torch.cat(self._joinids).cpu()
        bad = ids[~loss.isfinite()].tolist()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (bad, ids.tolist()))
        if any(b for b, _ in everyone):
            named = [f"worker {r}: soma_joinid {_listed(b)}" for r, (b, _) in enumerate(everyone) if b]
            return "the loss is not finite for " + "; ".join(named)
        named = [f"worker {r}: soma_joinid {_listed(all_)}" for r, (_, all_) in enumerate(everyone)]
        return "the losses are finite; the cells are " + "; ".join(named)


def _listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:NAMED])) + (f", … ({len(ids)})" if len(ids) > NAMED else "")


class Stopped(Exception):
    """Training was interrupted by a stop signal, with everything up to `step` in a checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by a signal after step {step}; the same command resumes from there")
        self.step = step


class TrainingStopped(Exception):
    """The run cannot continue, and a restart would end the same way."""
