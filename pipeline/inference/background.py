"""Two halves of a job at once: the caller makes the next thing while a thread deals with this one.

It is the second half that gets the thread: torch computes a third slower in any thread but the first, whose memory
comes from pools of its own that are handed back to the system after every layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self


class Behind:
    """Does one thing after the other, in order, in a thread: `with Behind(2) as behind: behind.do(write, tile)`.

    Leaving waits until all is done; leaving by an error drops what has not begun.

    Args:
        most: Things that may wait or be under way; `do` waits while there are so many.
    """

    def __init__(self, most: int):
        self._most = most
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._given: deque[Future[Any]] = deque()

    def __enter__(self) -> Self:
        return self

    def do(self, function: Callable[..., Any], *args: Any) -> None:
        """Hand over. Raises the error of something that was handed over before."""
        while self._given and (self._given[0].done() or len(self._given) >= self._most):
            self._given.popleft().result()
        self._given.append(self._pool.submit(function, *args))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            while self._given and kind is None:
                self._given.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
