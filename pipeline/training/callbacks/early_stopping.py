"""Early stopping, and the best checkpoint, by the validation loss.

The best loss, its step and the number of validations since are part of every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipeline.config.train import TrainConfig
from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.state import TrainingState


class EarlyStopping(TrainingCallback):
    """Finishes the run if the validation loss does not improve (`train.early_stopping`), and remembers the best step.

    Under `train.export: best` a checkpoint is requested at every improvement.
    """

    state_key = "best"

    def __init__(self, config: TrainConfig):
        self.config, self.saves_best = config.early_stopping, config.export == "best"
        self.loss, self.step, self.stopped = math.inf, 0, False
        self._reference = math.inf  # the loss that must be undercut by min_delta
        self._n_without = 0  # validations since the reference

    def on_train_start(self, state: TrainingState) -> None:
        if self.stopped:
            state.request_finish()

    def on_validation_end(self, state: TrainingState) -> None:
        improved = self.update(state.step, state.validation["val/loss"])
        if improved and self.saves_best:
            state.request_checkpoint()
        if self.stopped:
            state.request_finish()

    def update(self, step: int, loss: float) -> bool:
        """Account for a validation. Return whether its loss is the lowest so far; NaN never is."""
        if self.config is not None:
            improved = loss < self._reference - self.config.min_delta
            self._reference = loss if improved else self._reference
            self._n_without = 0 if improved else self._n_without + 1
            self.stopped = self._n_without >= self.config.patience
        if not loss < self.loss:
            return False
        self.loss, self.step = loss, step
        return True

    def facts(self) -> dict[str, Any]:
        return {"stopped_early": self.stopped}

    def state_dict(self) -> dict[str, Any]:
        return {
            "loss": _or_none(self.loss), "step": self.step, "stopped": self.stopped,
            "reference": _or_none(self._reference), "without": self._n_without,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss, self.step, self.stopped = _or_infinity(state["loss"]), state["step"], state["stopped"]
        self._reference, self._n_without = _or_infinity(state["reference"]), state["without"]


def _or_none(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None  # JSON has no infinity


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None else loss
