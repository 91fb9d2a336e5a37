"""Keeps losses that are not finite, and spikes, away from the weights.

A decision is made from sums over all workers, so that all of them make the same one. The guard's state (how many steps
were skipped, the losses that a spike is measured against) is part of every checkpoint: a resumed run decides as the
uninterrupted one would have.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from pipeline.config.train import TrainConfig
from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.state import StepLosses, TrainingState, TrainingStopped

MIN_LOSSES = 10  # that a median needs
log = logging.getLogger(__name__)


class StepGuard(TrainingCallback):
    """Decides whether a step updates the weights, by `train.non_finite`, `train.max_skipped` and `train.spike`."""

    state_key = "guard"

    def __init__(self, config: TrainConfig):
        self.config = config
        self.skipped, self.in_a_row, self.spikes = 0, 0, 0
        self._losses: deque[float] = deque(maxlen=config.spike.window)

    def accept_update(self, state: TrainingState, losses: StepLosses) -> bool:
        return self.accepts(losses.mean, losses.n_non_finite)

    def on_update(self, state: TrainingState, losses: StepLosses, *, applied: bool) -> None:
        message = self.record(state.step, losses, applied=applied)
        if message is not None and dist.get_rank() == 0:
            log.warning(message)

    def collect_metrics(self, state: TrainingState) -> dict[str, float]:
        return {"train/skipped": float(self.skipped)}

    def accepts(self, loss: float, n_non_finite: int) -> bool:
        """Return whether a step with this mean loss may update the weights."""
        if n_non_finite or not math.isfinite(loss):
            return False
        return not (self._is_spike(loss) and self.config.spike.action == "skip")

    def record(self, step: int, losses: StepLosses, *, applied: bool) -> str | None:
        """Account for a step. Return a message if it was a spike or was skipped. Collective.

        Args:
            applied: Whether it changed the weights.

        Raises:
            TrainingStopped: on all workers, if the settings end the run here.
        """
        loss = losses.mean
        is_spike = math.isfinite(loss) and self._is_spike(loss)
        self.spikes += is_spike
        if applied:
            self.in_a_row = 0
            message = f"step {step} is a spike: {self._against_median(loss)}" if is_spike else None
            self._losses.append(loss)
            return message
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        is_skipped_spike = is_spike and self.config.spike.action == "skip"
        reason = (
            f"a spike ({self._against_median(loss)})" if is_skipped_spike else "a loss or gradient that is not finite"
        )
        message = f"step {step} has {reason}; {losses.describe_cells()}"
        if not is_skipped_spike and self.config.non_finite == "stop":
            raise TrainingStopped(
                f"{message}. train.non_finite is stop; remove these cells (scldm validate-data), lower "
                "train.optimizer.lr, or set train.non_finite=skip"
            )
        if self.in_a_row >= self.config.max_skipped:
            raise TrainingStopped(
                f"{message}. It is number {self.in_a_row} in a row, train.max_skipped is {self.config.max_skipped}; "
                "lower train.optimizer.lr or train.optimizer.clip, or inspect these cells (scldm validate-data)"
            )
        return f"{message}. Skipped on all workers: {self.in_a_row} in a row, {self.skipped} in total"

    def _is_spike(self, loss: float) -> bool:
        factor = self.config.spike.factor
        return factor is not None and len(self._losses) >= MIN_LOSSES and loss > factor * self._median()

    def _median(self) -> float:
        return statistics.median(self._losses)

    def _against_median(self, loss: float) -> str:
        return f"loss {loss:.4g}, median of the last {len(self._losses)} steps {self._median():.4g}"

    def facts(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped}

    def state_dict(self) -> dict[str, Any]:
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes}
        return counts | {"losses": list(self._losses) if self.config.spike.factor is not None else []}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.in_a_row, self.spikes = state["skipped"], state["in_a_row"], state["spikes"]
        self._losses.extend(state["losses"])
