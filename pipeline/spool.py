"""Send records to a service that may be down, without ever making the sender wait.

One background thread takes records from a bounded queue and delivers them in order. What cannot be delivered goes to
a JSONL file beside the work, and is sent from there once the service answers. The caller's side is one `put_nowait`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger("scldm.tracking")
Record = dict[str, Any]
CAPACITY = 20_000
BATCH = 200
RETRY_SECONDS = 20.0


class Target(Protocol):
    """Where records go."""

    name: str
    spool: Path

    def send(self, records: list[Record]) -> None:
        """Deliver; raise if the service cannot be reached."""


class SpooledWriter:
    """The thread and its queue; any number of targets."""

    def __init__(self, capacity: int = CAPACITY, retry_seconds: float = RETRY_SECONDS) -> None:
        self.dropped = 0
        self.retry_seconds = retry_seconds
        self._queue: queue.Queue[tuple[Target, Record] | None] = queue.Queue(capacity)
        self._down_until: dict[int, float] = {}
        self._targets: dict[int, Target] = {}
        self._in_flight: tuple[Target, list[Record]] | None = None
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
        if self._in_flight is not None:
            _append(*self._in_flight)
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                _append(item[0], [item[1]])

    # ---- the thread ------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        closing = False
        while not closing and not self._abandoned:
            closing = self._deliver_queued()
        for target in self._targets.values():  # a last try, even where the service was down
            if target.spool.is_file() and not self._abandoned:
                self._down_until.pop(id(target), None)
                self._replay(target)

    def _deliver_queued(self) -> bool:
        """Wait for a record, take what else is queued for the same target, deliver. True at the end of the queue."""
        item = self._queue.get()
        while item is not None:
            target, records = item[0], [item[1]]
            item = None
            while len(records) < BATCH and not self._queue.empty():
                item = self._queue.get()
                if item is None or item[0] is not target:
                    break
                records.append(item[1])
                item = None
            else:
                self._deliver(target, records)
                return False
            self._deliver(target, records)
        return True

    def _deliver(self, target: Target, records: list[Record]) -> None:
        self._targets[id(target)] = target
        if time.monotonic() < self._down_until.get(id(target), 0.0):
            _append(target, records)
            return
        if target.spool.is_file() and not self._replay(target):  # older records first
            _append(target, records)
            return
        if not self._try(target, records):
            _append(target, records)

    def _try(self, target: Target, records: list[Record]) -> bool:
        self._in_flight = (target, records)
        try:
            target.send(records)
        except Exception as error:
            if id(target) not in self._down_until:
                cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                log.warning("tracking of %s waits in %s: %s", target.name, target.spool, cause)
            self._down_until[id(target)] = time.monotonic() + self.retry_seconds
            return False
        finally:
            self._in_flight = None
        self._down_until.pop(id(target), None)
        return True

    def _replay(self, target: Target) -> bool:
        """Send the spool. It is renamed first, so that other processes can go on appending to a new one."""
        taken = target.spool.with_name(f".{target.spool.name}.{os.getpid()}")
        try:
            target.spool.rename(taken)
            records = [json.loads(line) for line in taken.read_text().splitlines() if line.strip()]
        except (OSError, ValueError):
            return True
        for start in range(0, len(records), BATCH):
            if not self._try(target, records[start : start + BATCH]):
                _append(target, records[start:])
                break
        taken.unlink(missing_ok=True)
        return not target.spool.is_file()


def _append(target: Target, records: list[Record]) -> None:
    try:
        with target.spool.open("a") as f:
            f.write("".join(json.dumps(r) + "\n" for r in records))
    except OSError as error:
        log.warning("tracking of %s: %d records lost, %s: %s", target.name, len(records), target.spool, error)
