"""Where a step's time goes: waiting for data, computing, writing checkpoints. In seconds per step, by host clock.

On a GPU the computation is waited for once per step, when its loss is read, so the parts add up there too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class StepClock:
    """Seconds by name since the last `take`; parts are mean seconds of a step, a checkpoint's are those of one."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the time inside as one of `name`."""
        start = self._clock()
        try:
            yield
        finally:
            self._add(name, self._clock() - start)

    def waiting(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """The items; the time that each is waited for counts as one of `name`."""
        while True:
            start = self._clock()
            try:
                item = next(items)
            except StopIteration:
                return
            self._add(name, self._clock() - start)
            yield item

    def take(self) -> dict[str, float]:
        """perf/<name>_s for what was counted since the last time."""
        means = {f"perf/{name}_s": seconds / self._counts[name] for name, seconds in self._seconds.items()}
        self._seconds, self._counts = {}, {}
        return means

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._counts[name] = self._counts.get(name, 0) + 1
