"""Runs the second half of a job's work in a background thread while the caller continues with the next item.

The second half gets the thread, not the first: torch computes a third slower in any thread but the first, whose memory
comes from separate pools that are returned to the system after every layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self


class BackgroundWriter:
    """Runs calls in order in one thread: `with BackgroundWriter(2) as writer: writer.submit(write, tile)`.

    Leaving the block waits until all calls are done; leaving it by an error drops the calls that have not begun.

    Args:
        max_pending: Number of calls that may be waiting or running; `submit` blocks while there are as many.
    """

    def __init__(self, max_pending: int):
        self._max_pending = max_pending
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background-writer")
        self._pending: deque[Future[Any]] = deque()

    def __enter__(self) -> Self:
        return self

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Queue a call. Raises the error of a call that was queued before, if it failed."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= self._max_pending):
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(function, *args))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            while self._pending and kind is None:
                self._pending.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
