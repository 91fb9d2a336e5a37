"""Imports TileDB-SOMA to its end: the only module that imports `tiledbsoma`.

Ray cancels a task with the signal of Ctrl-C and gives the next task to the same process. An import that is cut short
leaves that process with half of the library (`module 'somacore' has no attribute 'collection'`), for every task after
it; and this import takes seconds, in the first task of a process. So the signal waits until the import is over.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT back until the block is over; then its handler runs, once.

    Other threads than the main one get no signals: there this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[FrameType | None] = []
    before = signal.signal(signal.SIGINT, lambda _, frame: held.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held and callable(before):
        before(signal.SIGINT, held[-1])


with uninterrupted():
    import tiledbsoma as soma

__all__ = ["soma", "uninterrupted"]
