"""What rank 0 leaves of a run to look at: the training curve on disk and in the tracker, and progress for people."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config.job import TrainConfig
from pipeline.core.progress import ProgressWriter
from pipeline.data.loading.order import FeedOrder

LOG_EVERY = 10  # steps between points of the training curve


class TrainingCurve:
    """Rank 0: the training curve on disk, in the tracker, and progress for people."""

    def __init__(
        self,
        folder: Path,
        tracker: Any,
        config: TrainConfig,
        start: int,
        order: FeedOrder,
        mfu: Callable[[float], float | None] = lambda cells_per_s: None,
    ):
        self.path = folder / "metrics.jsonl"
        self.tracker, self.config, self.order = tracker, config, order
        self.mfu = mfu  # share of the devices' peak, from cells per second; None where the peak is not known
        self.progress = ProgressWriter(folder)
        self._cut(start)
        self.recent: deque[tuple[float, int]] = deque(maxlen=50)  # the rate is that of the last steps, without start-up

    def _cut(self, start: int) -> None:
        """Drop what a killed attempt wrote past its checkpoint. By rename: on a full disk the old curve stays."""
        text = "".join(json.dumps(row) + "\n" for row in self._rows() if row["step"] <= start)
        if not self.path.exists() or self.path.read_text() != text:
            with self._or_say():
                tmp = self.path.with_name(f".{self.path.name}.tmp")
                tmp.write_text(text)
                tmp.replace(self.path)

    @contextmanager
    def _or_say(self) -> Iterator[None]:
        """The curve is worth a line, not the run."""
        try:
            yield
        except OSError as error:
            print(f"THE CURVE CANNOT BE WRITTEN to {self.path}: {error}. Training goes on", flush=True)

    def _rows(self) -> Iterator[dict[str, float]]:
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    continue  # the half line of a killed attempt

    def last(self) -> dict[str, float]:
        merged: dict[str, float] = {}
        for row in self._rows():
            merged |= {k: v for k, v in row.items() if k not in ("step", "time_ms")}
        return merged

    def write(self, step: int, metrics: dict[str, float], grad_norm: float | None, *, last: bool) -> None:
        self.recent.append((time.monotonic(), step))
        (then, first), (now, _) = self.recent[0], self.recent[-1]
        rate = (step - first) * self.order.batch_size / (now - then) if now > then else 0.0
        shown = {"loss": metrics.get("train/loss"), "val": metrics.get("val/loss"), "lr": metrics.get("train/lr")}
        shown |= {"cells_per_s": rate or None}  # none of them is known in the first step of an attempt
        self.progress.update(
            step,
            self.config.max_steps,
            **{k: v for k, v in shown.items() if v is not None and math.isfinite(v)},
        )
        validated = step % self.config.validate_every == 0 or last
        if step % LOG_EVERY and not validated and not last:
            return
        row = {k: v for k, v in metrics.items() if validated or not k.startswith("val/")}
        row["train/cells_seen"] = float(step * self.order.batch_size)
        if rate:  # not in the first step of an attempt
            row["perf/cells_per_s"] = rate
            if (share := self.mfu(rate)) is not None:
                row["perf/mfu"] = share
        if grad_norm is not None:
            row["train/grad_norm"] = grad_norm
        self.progress.gauges.set(row)
        time_ms = int(time.time() * 1000)
        with self._or_say(), self.path.open("a") as f:
            f.write(json.dumps({"step": step, "time_ms": time_ms, **row}) + "\n")
        self.tracker.metrics(row, step=step, time_ms=time_ms)
