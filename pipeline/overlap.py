"""Two halves of a job at once: a thread makes the next thing while the caller uses this one."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], n: int) -> Iterator[T]:
    """The items, made in a thread, at most n of them waiting. Errors of the maker are raised here.

    The thread ends with the iterator, also where that is left half-way.
    """
    ready: queue.Queue[Any] = queue.Queue(n)
    over = threading.Event()

    def put(kind: str, item: Any) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((kind, item), timeout=0.2)
                return

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if over.is_set():
                    return
            put("end", None)
        except BaseException as error:  # goes to who iterates
            put("error", error)

    thread = threading.Thread(target=work, name="maker", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise item
            yield item
            del item  # else it lives until the next one comes
    finally:
        over.set()
        thread.join(timeout=60)
