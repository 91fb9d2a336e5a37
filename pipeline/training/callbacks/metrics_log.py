"""The metrics of a run: the mean loss on every rank; from rank 0 the log on disk, the tracker and the progress file."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config.context import Tracker
from pipeline.config.job import TrainConfig
from pipeline.core.progress import ProgressWriter
from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.state import StepLosses, TrainingState

LOG_EVERY = 10  # steps between rows
METRICS = "metrics.jsonl"
log = logging.getLogger(__name__)


class MeanLoss(TrainingCallback):
    """The mean loss per cell since the metrics were last collected, over all workers; NaN if every step was skipped.

    It is part of a checkpoint, so that a resumed run logs what the uninterrupted one would have.
    """

    state_key = "losses"

    def __init__(self) -> None:
        self.total, self.n_cells = 0.0, 0

    def on_update(self, state: TrainingState, losses: StepLosses, *, applied: bool) -> None:
        if applied:
            self.add(losses.total, losses.n_cells)

    def collect_metrics(self, state: TrainingState) -> dict[str, float]:
        return {"train/loss": self.take(), "train/lr": state.lr}

    def add(self, total: float, n_cells: int) -> None:
        """Add the sum of the losses of some cells."""
        self.total, self.n_cells = self.total + total, self.n_cells + n_cells

    def take(self) -> float:
        """Return the mean and start again."""
        mean = self.total / self.n_cells if self.n_cells else math.nan
        self.total, self.n_cells = 0.0, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "cells": self.n_cells}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.add(state["total"], state["cells"])


class MetricsLog(TrainingCallback):
    """Writes metrics.jsonl, sends the same rows to the tracker, and shows progress. Only rank 0 has one.

    A failed write is logged but never stops training.

    Args:
        folder: The stage's folder.
        batch_size: Cells of a global batch.
        grad_norm: Returns the gradient norm of the last step, if it is known.
        mfu: Returns the share of the devices' peak from cells per second; None if the peak is not known.
    """

    def __init__(
        self,
        folder: Path,
        tracker: Tracker,
        config: TrainConfig,
        *,
        batch_size: int,
        grad_norm: Callable[[], float | None] = lambda: None,
        mfu: Callable[[float], float | None] = lambda cells_per_s: None,
    ):
        self.path = folder / METRICS
        self.tracker, self.config, self.batch_size = tracker, config, batch_size
        self.grad_norm, self.mfu = grad_norm, mfu
        self.progress = ProgressWriter(folder)
        self._recent: deque[tuple[float, int]] = deque(
            maxlen=50
        )  # the rate is that of the last steps, without start-up

    def on_train_start(self, state: TrainingState) -> None:
        if state.resumed_from is not None:
            self.tracker.tag("scldm.resumed_from_step", state.resumed_from)
        if state.rejected_checkpoints:
            self.tracker.metrics({"ckpt/rejected": float(state.rejected_checkpoints)}, step=state.step)
        self._drop_rows_after(state.step)
        if state.step == state.max_steps or state.finish_requested:
            state.metrics = self._last_values()  # nothing is trained any more, so nothing will be measured

    def on_step_end(self, state: TrainingState) -> None:
        rate = self._rate(state.step)
        self._show_progress(state, rate)
        validated = bool(state.validation)
        if state.step % LOG_EVERY and not validated and not state.is_last:
            return
        row = {k: v for k, v in state.metrics.items() if validated or not k.startswith("val/")}
        row["train/cells_seen"] = float(state.step * self.batch_size)
        if rate:  # not in the first step of an attempt
            row["perf/cells_per_s"] = rate
            if (share := self.mfu(rate)) is not None:
                row["perf/mfu"] = share
        if (norm := self.grad_norm()) is not None:
            row["train/grad_norm"] = norm
        self.progress.gauges.set(row)
        time_ms = int(time.time() * 1000)
        with self._never_fail(), self.path.open("a") as f:
            f.write(json.dumps({"step": state.step, "time_ms": time_ms, **row}) + "\n")
        self.tracker.metrics(row, step=state.step, time_ms=time_ms)

    def _rate(self, step: int) -> float:
        """Cells per second over the last steps; 0 in the first step of an attempt."""
        self._recent.append((time.monotonic(), step))
        (then, first), (now, _) = self._recent[0], self._recent[-1]
        return (step - first) * self.batch_size / (now - then) if now > then else 0.0

    def _show_progress(self, state: TrainingState, rate: float) -> None:
        names = {"loss": "train/loss", "val": "val/loss", "lr": "train/lr"}
        shown = {name: state.metrics.get(key) for name, key in names.items()}
        shown |= {"cells_per_s": rate or None}  # none of them is known in the first step of an attempt
        finite = {k: v for k, v in shown.items() if v is not None and math.isfinite(v)}
        self.progress.update(state.step, self.config.max_steps, **finite)

    def _drop_rows_after(self, step: int) -> None:
        """Drop what a killed attempt wrote past its checkpoint. By rename: on a full disk the old log stays."""
        text = "".join(json.dumps(row) + "\n" for row in self._rows() if row["step"] <= step)
        if not self.path.exists() or self.path.read_text() != text:
            with self._never_fail():
                tmp = self.path.with_name(f".{self.path.name}.tmp")
                tmp.write_text(text)
                tmp.replace(self.path)

    def _last_values(self) -> dict[str, float]:
        merged: dict[str, float] = {}
        for row in self._rows():
            merged |= {k: v for k, v in row.items() if k not in ("step", "time_ms")}
        return merged

    def _rows(self) -> Iterator[dict[str, float]]:
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    continue  # the partial line of a killed attempt

    @contextmanager
    def _never_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.error(f"THE METRICS CANNOT BE WRITTEN to {self.path}: {error}. Training goes on")
