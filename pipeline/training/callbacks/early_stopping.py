"""When to end, and which step is the best: by the validation loss.

What it knows (the best loss, its step, how many validations ago) is part of every checkpoint.
"""

from __future__ import annotations

import math
from typing import Any

from pipeline.config.train import TrainConfig


class BestSoFar:
    """The lowest validation loss, and whether to go on looking for a lower one."""

    def __init__(self, config: TrainConfig):
        self.config = config.early_stopping
        self.loss, self.step, self.stopped = math.inf, 0, False
        self._reference, self._without = (
            math.inf,
            0,
        )  # early stopping counts from a loss that must be undercut by min_delta

    def see(self, step: int, loss: float) -> bool:
        """Account for a validation; whether it is the best so far. A loss that is not a number never is."""
        if self.config is not None:
            improved = loss < self._reference - self.config.min_delta
            self._reference = loss if improved else self._reference
            self._without = 0 if improved else self._without + 1
            self.stopped = self._without >= self.config.patience
        if not loss < self.loss:
            return False
        self.loss, self.step = loss, step
        return True

    def state(self) -> dict[str, Any]:
        """Plain data, for a checkpoint; JSON has no infinity."""
        finite = lambda x: x if math.isfinite(x) else None  # noqa: E731
        return {
            "loss": finite(self.loss), "step": self.step, "stopped": self.stopped,
            "reference": finite(self._reference), "without": self._without,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        read = lambda x: math.inf if x is None else x  # noqa: E731
        self.loss, self.step, self.stopped = read(state["loss"]), state["step"], state["stopped"]
        self._reference, self._without = read(state["reference"]), state["without"]
