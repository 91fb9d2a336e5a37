"""Measures where a step's time goes: waiting for data, computing, writing checkpoints. In seconds, by the host's clock.

On a GPU the host waits for the computation once per step, when the loss is read, so the parts add up there too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.state import TrainingState

T = TypeVar("T")


class StepTimer(TrainingCallback):
    """Mean seconds by name since the metrics were last collected. The loop measures itself with it.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time inside the block as one of `name`."""
        start = self._clock()
        try:
            yield
        finally:
            self._add(name, self._clock() - start)

    def measure_waits(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """Yield the items; the time spent waiting for each counts as one of `name`."""
        while True:
            start = self._clock()
            try:
                item = next(items)
            except StopIteration:
                return
            self._add(name, self._clock() - start)
            yield item

    def collect_metrics(self, state: TrainingState) -> dict[str, float]:
        return self.take()

    def take(self) -> dict[str, float]:
        """Return perf/<name>_s, the means since the last call."""
        means = {f"perf/{name}_s": seconds / self._counts[name] for name, seconds in self._seconds.items()}
        self._seconds, self._counts = {}, {}
        return means

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._counts[name] = self._counts.get(name, 0) + 1
