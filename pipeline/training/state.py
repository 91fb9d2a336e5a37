"""What the loop remembers beside weights and position: the part of a checkpoint that is plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.training.resilience.early_stopping import BestSoFar
from pipeline.training.resilience.step_guard import StepGuard


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
