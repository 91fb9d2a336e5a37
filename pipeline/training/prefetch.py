"""Prepares the next step while the current one computes: Arrow tables become tensors in a thread, one step ahead.

On a GPU the thread pins them and copies them on a stream of its own, so that the copy overlaps with the computation;
the step then waits for an event, not for the host. The order of steps is the feed's; nothing here is random.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator

import pyarrow as pa
import torch

from pipeline.data.loading.feed import FeedStep
from pipeline.training.objectives.base import Batch, MicroBatchIndex, map_tensors

AHEAD = 1  # prepared steps that wait on the device
PrepareBatch = Callable[[pa.Table, MicroBatchIndex], Batch]


class PreparedStep:
    """A step whose micro batches are on the device.

    Args:
        real_cells: Cells of the global batch, without repeats.
        event: Recorded when the copy to the device is done; None on a CPU.
    """

    def __init__(
        self,
        step: int,
        epoch: int,
        real_cells: int,
        micro_batches: list[tuple[MicroBatchIndex, Batch]],
        event: torch.cuda.Event | None,
    ):
        self.step, self.epoch, self.real_cells = step, epoch, real_cells
        self._micro_batches, self._event = micro_batches, event

    def micro_batches(self) -> Iterator[tuple[MicroBatchIndex, Batch]]:
        """Yield the micro batches, each with its index, once their copy to the device is done."""
        if self._event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._event)
            # The copying stream must not reuse their memory before this one is done.
            for _, batch in self._micro_batches:
                map_tensors(batch, lambda x: (x.record_stream(stream), x)[1] if x.is_cuda else x)
        yield from self._micro_batches


def prefetch(
    steps: Iterator[FeedStep], prepare: PrepareBatch, device: torch.device
) -> Generator[PreparedStep, None, None]:
    """Yield the steps, prepared and on the device.

    Args:
        steps: Read in a thread that ends with this iterator.
        prepare: Makes a batch, a dataclass of tensors on the CPU, from a table and its index.
        device: Where the batches are used.
    """
    ready: queue.Queue[PreparedStep | BaseException | None] = queue.Queue(AHEAD)
    ended = threading.Event()
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(item: PreparedStep | BaseException | None) -> None:
        while not ended.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.2)
                return

    def work() -> None:
        try:
            for step in steps:
                put(_prepare_step(step, prepare, device, stream))
                if ended.is_set():
                    break
            put(None)
        except BaseException as error:  # raised where the steps are used
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
        ended.set()
        thread.join(timeout=30)


def copy_to_gpu(batch: Batch, device: torch.device) -> Batch:
    """Start copying every tensor of a batch to a GPU, on the current stream.

    Each is pinned first: a copy from pageable memory waits for the host, `non_blocking` or not. The pinned memory is
    not used again before its copy is done: torch's allocator of pinned memory keeps an event for it.
    """
    moved: Batch = map_tensors(batch, lambda x: x.pin_memory().to(device, non_blocking=True))
    return moved


def _prepare_step(
    step: FeedStep, prepare: PrepareBatch, device: torch.device, stream: torch.cuda.Stream | None
) -> PreparedStep:
    on_cpu, start = [], 0
    for table in step.micro:
        index = MicroBatchIndex(step.step, step.epoch, start)
        on_cpu.append((index, prepare(table, index)))
        start += table.num_rows
    if stream is None:
        moved = [(index, map_tensors(batch, lambda x: x.to(device))) for index, batch in on_cpu]
        return PreparedStep(step.step, step.epoch, step.real_cells, moved, None)
    with torch.cuda.stream(stream):
        moved = [(index, copy_to_gpu(batch, device)) for index, batch in on_cpu]
        event = stream.record_event()
    return PreparedStep(step.step, step.epoch, step.real_cells, moved, event)
