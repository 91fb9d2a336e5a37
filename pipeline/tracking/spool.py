"""Send records to a service that may be down, without ever making the sender wait.

One background thread takes records from a bounded queue and delivers them in order. What cannot be delivered goes to
a JSONL file beside the work, and is sent from there once the service answers. The caller's side is one `put_nowait`.

A record may be sent twice (a request that was cut off, a process that was killed while it replayed), never lost:
whoever receives them must see that two are the same. A queue that fills faster than it empties goes to the file too.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Protocol

from pipeline.tracking.spool_file import Record, append, claim, parse, put_back

log = logging.getLogger("scldm.tracking")
CAPACITY = 20_000
BATCH = 200
RETRY_SECONDS = 20.0
WARN_SECONDS = 600.0


class NotReadyError(Exception):
    """The service will be ready in a moment, as always at the start: records wait, and nobody is warned."""


class Target(Protocol):
    """Where records go."""

    name: str
    spool: Path  # where this process leaves what it cannot deliver

    def spools(self) -> list[Path]:
        """Every file that waits for this target, also those that other processes left."""

    def send(self, records: list[Record]) -> list[Record]:
        """Deliver; raise if the service cannot be reached. Returns the records that it refuses for good."""


class SpooledWriter:
    """The thread and its queue; any number of targets."""

    def __init__(self, capacity: int = CAPACITY, retry_seconds: float = RETRY_SECONDS) -> None:
        self.dropped = 0
        self.retry_seconds = retry_seconds
        self.capacity = capacity
        self._queue: queue.Queue[tuple[Target, Record] | None] = queue.Queue(capacity)
        self._down_until: dict[int, float] = {}
        self._warned: dict[int, float] = {}
        self._targets: dict[int, Target] = {}
        self._met: set[int] = set()  # targets whose spools of earlier processes were looked for
        self._in_flight: list[tuple[Target, list[Record]]] = []  # taken from the queue, and nowhere else
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="tracking writer", daemon=True)
        self._thread.start()

    def put(self, target: Target, record: Record) -> None:
        """Never waits: where the queue is full the record is counted and dropped."""
        try:
            self._queue.put_nowait((target, record))
        except queue.Full:
            self.dropped += 1

    def close(self, seconds: float = 20.0) -> None:
        """Deliver what is queued; what is not delivered after `seconds` goes to the spools. Safe to call twice."""
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._abandon()
        if self.dropped:
            log.warning("tracking: %d records dropped, the queue was full", self.dropped)

    def _abandon(self) -> None:
        """The thread is stuck in a request. It is a daemon; its work is spooled here (a record may arrive twice)."""
        self._abandoned = True
        self._keep_in_flight()
        self._set_aside(everything=True)

    def _keep_in_flight(self) -> None:
        for target, records in list(self._in_flight):
            append(target.spool, records)

    # ---- the thread ------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        closing = False
        while not closing and not self._abandoned:
            closing = self._deliver_queued()
        for target in self._targets.values():  # a last try, even where the service was down
            self._down_until.pop(id(target), None)
            for spool in target.spools():
                if self._abandoned or not self._replay(target, spool):
                    break

    def _deliver_queued(self) -> bool:
        """Wait for a record, take what else is queued, deliver. True at the end of the queue."""
        taken, closing = [self._queue.get()], False
        while len(taken) < BATCH:
            try:
                taken.append(self._queue.get_nowait())
            except queue.Empty:
                break
        together: dict[int, list[Record]] = {}
        for item in taken:
            if item is None:
                closing = True
            else:
                self._targets[id(item[0])] = item[0]
                together.setdefault(id(item[0]), []).append(item[1])
        self._in_flight = [(self._targets[key], records) for key, records in together.items()]
        if self._abandoned:  # just now: who did it may not have seen them
            self._keep_in_flight()
        while self._in_flight and not self._abandoned:
            if not self._deliver(*self._in_flight[0]) and not self._abandoned:
                append(self._in_flight[0][0].spool, self._in_flight[0][1])
            if not self._abandoned:
                del self._in_flight[0]
        return closing

    def _deliver(self, target: Target, records: list[Record]) -> bool:
        if time.monotonic() < self._down_until.get(id(target), 0.0):
            return False
        self._set_aside()
        first, self._met = id(target) not in self._met, self._met | {id(target)}
        older = target.spools() if first else [target.spool] if target.spool.is_file() else []
        return all(self._replay(target, spool) for spool in older) and self._try(target, records)  # older ones first

    def _set_aside(self, *, everything: bool = False) -> None:
        """Where more comes than goes, the queue goes to the spools: slower than memory, but it does not end."""
        if not everything and self._queue.qsize() <= self.capacity // 2:
            return
        together: dict[int, tuple[Target, list[Record]]] = {}
        closing = False
        for _ in range(self.capacity):
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is None:
                closing = True
            else:
                together.setdefault(id(item[0]), (item[0], []))[1].append(item[1])
        for key, (target, records) in together.items():
            self._targets[key] = target
            append(target.spool, records)
        if closing:
            self._queue.put(None)

    def _try(self, target: Target, records: list[Record]) -> bool:
        try:
            refused = target.send(records)
        except Exception as error:
            if not isinstance(error, NotReadyError):
                self._warn(target, error)
            self._down_until[id(target)] = time.monotonic() + self.retry_seconds
            return False
        if refused:
            append(target.spool.with_name(f"refused.{target.spool.name}"), refused)
        self._down_until.pop(id(target), None)
        return True

    def _warn(self, target: Target, error: Exception) -> None:
        """Once in ten minutes: a service that comes and goes would fill the log."""
        now = time.monotonic()
        if now - self._warned.get(id(target), -WARN_SECONDS) >= WARN_SECONDS:
            cause = str(error).splitlines()[0][:400] if str(error) else type(error).__name__
            log.warning("tracking of %s waits in %s: %s", target.name, target.spool, cause)
            self._warned[id(target)] = now

    def _replay(self, target: Target, spool: Path) -> bool:
        """Send a spool. It is renamed first, so that other processes can go on appending to a new one."""
        taken = claim(spool)
        if taken is None:
            return True
        with taken.open() as f:
            while lines := list(islice(f, BATCH)):
                if self._abandoned or not self._try(target, parse(lines, spool)):
                    return put_back(taken, target.spool, [*lines, *f])
                self._set_aside()
        taken.unlink(missing_ok=True)
        return True
