"""The next step is made ready while this one computes: Arrow tables become tensors in a thread, one step ahead.

On a GPU the thread pins them and copies them on a stream of its own, so that the copy hides behind the computation; the
step then waits for an event, not for the host. The order of steps is the feed's; nothing here is random.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pyarrow as pa
import torch

from pipeline.data.loading.feed import FeedStep
from pipeline.training.objectives.base import Slice, map_tensors

AHEAD = 1  # steps that wait, ready, on the device


class Ready:
    """A step whose micro batches are on the device."""

    def __init__(self, step: int, epoch: int, real_cells: int, parts: list[tuple[Slice, Any]], event: Any):
        self.step, self.epoch, self.real_cells, self._parts, self._event = step, epoch, real_cells, parts, event

    def parts(self) -> Iterator[tuple[Slice, Any]]:
        """Micro batches, each with the part of the step that it is."""
        if self._event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._event)
            for _, batch in self._parts:  # the copying stream must not reuse their memory before this one is done
                map_tensors(batch, lambda x: (x.record_stream(stream), x)[1] if x.is_cuda else x)
        yield from self._parts


def prefetch(
    steps: Iterator[FeedStep], prepare: Callable[[pa.Table, Slice], Any], device: torch.device
) -> Generator[Ready, None, None]:
    """Steps with their tables prepared and on the device.

    Args:
        steps: Read in a thread of this iterator's own, which ends with it.
        prepare: From a table and its place to a batch: a dataclass of tensors on the CPU.
        device: Where the batches are to be.
    """
    ready: queue.Queue[Any] = queue.Queue(AHEAD)
    over = threading.Event()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(item: Any) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.2)
                return

    def work() -> None:
        try:
            for step in steps:
                put(_ready(step, prepare, device, stream))
                if over.is_set():
                    break
            put(None)
        except BaseException as error:  # goes to who iterates
            put(error)
        finally:
            close = getattr(steps, "close", None)
            if close is not None:
                close()  # in the thread that ran it

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        over.set()
        thread.join(timeout=30)


def _ready(step: FeedStep, prepare: Callable[[pa.Table, Slice], Any], device: torch.device, stream: Any) -> Ready:
    parts, start = [], 0
    for table in step.micro:
        part = Slice(step.step, step.epoch, start)
        parts.append((part, prepare(table, part)))
        start += table.num_rows
    if stream is None:
        moved = [(at, map_tensors(batch, lambda x: x.to(device))) for at, batch in parts]
        return Ready(step.step, step.epoch, step.real_cells, moved, None)
    with torch.cuda.stream(stream):
        moved = [(at, map_tensors(b, lambda x: x.pin_memory().to(device, non_blocking=True))) for at, b in parts]
        event = stream.record_event()
    return Ready(step.step, step.epoch, step.real_cells, moved, event)
