"""Upload of checkpoints to the second place, beside training and never in its way.

One thread of rank 0; one checkpoint in flight and at most one waiting: a newer one takes the place of one that waits.
What fails is tried again, then said loudly and remembered in `uploads.json`; the next start tries it once more.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.files import write_json_atomic
from pipeline.training.checkpoints.manifest import Found, read, to_keep
from pipeline.training.checkpoints.remote import Remote

SPOOL = "uploads.json"
FIRST_WAIT = 1.0  # seconds, doubled after every try


def say(line: str) -> None:
    print(line, flush=True)


class Uploader:
    """Copies committed checkpoints to `remote` in the background.

    Args:
        root: The folder that holds them here.
        keep: (keep_last, keep_best), for the second place as for the first.
    """

    def __init__(
        self,
        root: Path,
        remote: Remote,
        keep: tuple[int, int],
        *,
        tries: int,
        first_wait: float = FIRST_WAIT,
        tell: Callable[[str], None] = say,
    ):
        self.root, self.remote, self.keep, self.tries, self.first_wait, self.tell = (
            root, remote, keep, tries, first_wait, tell,
        )  # fmt: skip
        self.seconds: list[float] = []  # of the uploads that were made
        self._waiting: Path | None = None
        self._flying: Path | None = None
        self._there = ""  # the name of a checkpoint that needs no copy
        self._changed = threading.Condition()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="checkpoint upload", daemon=True)
        self._thread.start()

    def put(self, folder: Path) -> None:
        """Hand over a committed checkpoint. Returns at once."""
        with self._changed:
            if self._waiting is not None and self._waiting.name != self._there:
                self.tell(f"checkpoint upload: {self._waiting.name} is left out, {folder.name} is newer")
            self._waiting = folder
            self._changed.notify_all()

    def tidy(self, newest: Path) -> None:
        """Remove there what need not stay beside a checkpoint that is there: a kill may have come in between, and a run
        that has done all its steps copies no other. Returns at once."""
        with self._changed:
            self._there = newest.name
            self._waiting = newest
            self._changed.notify_all()

    def busy(self) -> frozenset[str]:
        """Names that must not be removed."""
        with self._changed:
            return frozenset(p.name for p in (self._waiting, self._flying) if p is not None)

    def pending(self) -> list[str]:
        """Checkpoints whose upload failed in an earlier attempt."""
        try:
            return list(json.loads((self.root / SPOOL).read_text())["failed"])
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def close(self, wait: float) -> bool:
        """Wait for what is under way, at most so many seconds. Whether all of it arrived."""
        until = time.monotonic() + wait
        with self._changed:
            while (self._waiting or self._flying) and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            unfinished = [p for p in (self._flying, self._waiting) if p is not None and p.name != self._there]
        self._end.set()
        with self._changed:
            self._changed.notify_all()
        for folder in unfinished:
            self._failed(folder, f"not done after {wait:.0f} s")
        return not self.pending()

    # ---- in the thread -------------------------------------------------------------------------------------------
    def _work(self) -> None:
        while (folder := self._next()) is not None:
            began = time.monotonic()
            there = folder.name == self._there
            problem = None if there else self._try(folder)
            if self._end.is_set():
                return  # close has said what there is to say
            if problem is None:
                if not there:
                    self.seconds.append(time.monotonic() - began)
                self._arrived(folder)
            else:
                self._failed(folder, problem)
            with self._changed:
                self._flying = None
                self._changed.notify_all()

    def _next(self) -> Path | None:
        with self._changed:
            while self._waiting is None and not self._end.is_set():
                self._changed.wait()
            if self._end.is_set():
                return None
            self._flying, self._waiting = self._waiting, None
            return self._flying

    def _try(self, folder: Path) -> str | None:
        """What was wrong with the last try; None if it went through."""
        problem = "no try was made"
        for i in range(self.tries):
            if i and self._end.wait(self.first_wait * 2 ** (i - 1)):
                break
            try:
                self.remote.put(folder)
                return None
            except Exception as error:  # whatever a store throws must not end training
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
                self.tell(
                    f"checkpoint upload: {folder.name} to {self.remote.address}: try {i + 1} of {self.tries}: {problem}"
                )
        return problem

    def _arrived(self, folder: Path) -> None:
        self._remember([])  # what failed before is older than this
        try:
            self._retain(folder.name)
        except Exception as error:  # it costs room there, no more
            self.tell(f"checkpoint upload: old checkpoints under {self.remote.address} stay: {error}")

    def _failed(self, folder: Path, problem: str) -> None:
        self.tell(
            f"CHECKPOINT UPLOAD FAILED: {folder.name} is not under {self.remote.address} ({problem}); training goes "
            f"on, the checkpoint is in {folder}. The next checkpoint is tried, and this one again at the next start"
        )
        self._remember([*self.pending(), folder.name])

    def _remember(self, failed: list[str]) -> None:
        try:
            state: dict[str, Any] = {"failed": failed, "to": self.remote.address, "at": time.time()}
            write_json_atomic(self.root / SPOOL, state)
        except OSError as error:
            self.tell(f"checkpoint upload: {SPOOL} cannot be written ({error})")

    def _retain(self, newest: str) -> None:
        """In the second place. Nobody else copies there, so what has no manifest and is older was left by a kill."""
        found: list[Found] = []
        for name in self.remote.names():
            with contextlib.suppress(OSError, ValueError):  # not ours to judge, so not ours to remove
                found.append(self._known(name))
        stay = {newest, *to_keep(found, keep_last=self.keep[0], keep_best=self.keep[1])}
        for f in found:
            if f.folder.name not in stay and f.folder.name < newest:
                self.remote.remove(f.folder.name)
        for name in self.remote.unfinished():
            if name < newest:
                self.remote.remove_unfinished(name)

    def _known(self, name: str) -> Found:
        """By its manifest here; where that is gone, or going at this very moment, by the one there."""
        with contextlib.suppress(OSError, ValueError):
            return read(self.root / name)
        return self.remote.manifest(name, self.root / ".remote")
