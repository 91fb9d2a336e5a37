"""Send records to a server that may be down, without ever making the caller wait.

One daemon thread takes records from a bounded queue and delivers them. Nothing is kept for a server that is away: every
record is in a file already (see `record_log`), and a target that missed some is asked to replay that file once the
server answers again.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
from typing import Protocol

from pipeline.tracking.record_log import Record

log = logging.getLogger(__name__)
CAPACITY = 20_000  # records
BATCH = 200
WARN_SECONDS = 600.0
# How long the thread may keep the training waiting, each time that the training lets go of the interpreter's lock and
# wants it back. Python's own 5 ms are a step of a small network.
SWITCH_SECONDS = 0.0005


class NotReadyError(Exception):
    """The run is about to be created, as always at the start of a job: try again, and warn nobody."""


class Target(Protocol):
    """A run that records are sent to."""

    name: str

    def deliver(self, records: list[Record], *, replay: bool) -> None:
        """Send records; raise if the server cannot be reached.

        Args:
            replay: Earlier records were missed: complete the run from the files on disk.
        """


class BackgroundSender:
    """The thread and its queue, shared by any number of targets.

    Args:
        capacity: Records that the queue holds. Those that do not fit are replayed from disk.
        retry_seconds: How long a target is left alone after a failure.
    """

    def __init__(self, capacity: int = CAPACITY, retry_seconds: float = 20.0) -> None:
        self.retry_seconds = retry_seconds
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._queue: queue.Queue[tuple[Target, Record] | None] = queue.Queue(capacity)
        self._behind: set[Target] = set()  # targets that missed records
        self._retry_at: dict[Target, float] = {}
        self._warned_at: dict[Target, float] = {}
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="tracking sender", daemon=True)
        self._thread.start()

    def put(self, target: Target, record: Record) -> None:
        """Queue a record without waiting. It must be on disk already."""
        try:
            self._queue.put_nowait((target, record))
        except queue.Full:
            self._behind.add(target)

    def close(self, seconds: float = 20.0) -> None:
        """Deliver what is queued and replay what was missed, within `seconds`. Safe to call twice."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._abandoned = True  # if it is stuck in a request: a later replay from disk completes the run

    # ---- in the thread ---------------------------------------------------------------------------------------------
    def _run(self) -> None:
        closing = False
        while not closing and not self._abandoned:
            batch, closing = self._next_batch()
            for target, records in batch.items():
                self._deliver(target, records)
        for target in list(self._behind):  # one last attempt, without regard to the time of the last failure
            self._retry_at.pop(target, None)
            self._deliver(target, [])

    def _next_batch(self) -> tuple[dict[Target, list[Record]], bool]:
        """Wait for a record, and take what else is queued.

        Returns:
            Records by target, those of a target that is due for another attempt may be none; whether the queue ended.
        """
        items: list[tuple[Target, Record] | None] = []
        with contextlib.suppress(queue.Empty):
            items.append(self._queue.get(timeout=self.retry_seconds if self._behind else None))
            while len(items) < BATCH:
                items.append(self._queue.get_nowait())
        batch: dict[Target, list[Record]] = {} if items else {target: [] for target in list(self._behind)}
        for item in items:
            if item is not None:
                batch.setdefault(item[0], []).append(item[1])
        return batch, None in items

    def _deliver(self, target: Target, records: list[Record]) -> None:
        if self._abandoned:
            return
        if time.monotonic() < self._retry_at.get(target, 0.0):
            self._behind.add(target)
            return
        replay = target in self._behind
        self._behind.discard(target)  # before the files are read: what is missed from now on needs another replay
        try:
            target.deliver(records, replay=replay)
        except Exception as error:  # a server may fail in any way, and none of them may stop the thread
            self._behind.add(target)
            self._retry_at[target] = time.monotonic() + self.retry_seconds
            if not isinstance(error, NotReadyError):
                self._warn(target, error)

    def _warn(self, target: Target, error: Exception) -> None:
        """Log a failure, at most once in ten minutes: a server that comes and goes would fill the log."""
        now = time.monotonic()
        if now - self._warned_at.get(target, -WARN_SECONDS) >= WARN_SECONDS:
            cause = str(error).splitlines()[0][:400] if str(error) else type(error).__name__
            log.warning("tracking of %s is delayed: %s", target.name, cause)
            self._warned_at[target] = now
