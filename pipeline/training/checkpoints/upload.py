"""Uploads checkpoints to remote storage in the background; training never waits for it.

One thread of rank 0; one checkpoint in progress and at most one waiting: a newer one replaces one that waits. A failed
upload is tried again, then logged as an error and recorded in `uploads.json`; the next start tries it once more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

from pipeline.core.files import write_json_atomic
from pipeline.training.checkpoints.manifest import CheckpointInfo, read, to_keep
from pipeline.training.checkpoints.remote import Remote

FAILED_UPLOADS = "uploads.json"
FIRST_WAIT = 1.0  # seconds, doubled after every try
log = logging.getLogger(__name__)


class Uploader:
    """Copies committed checkpoints to `remote` in the background.

    Args:
        root: The local folder of the checkpoints.
        keep: (keep_last, keep_best), the same for remote storage as for the local folder.
        tries: Tries of one upload.
        first_wait: Seconds before the second try.
    """

    def __init__(
        self, root: Path, remote: Remote, keep: tuple[int, int], *, tries: int, first_wait: float = FIRST_WAIT
    ):
        self.root, self.remote, self.keep, self.tries, self.first_wait = root, remote, keep, tries, first_wait
        self.seconds: list[float] = []  # that each finished upload took
        self._waiting: Path | None = None
        self._in_progress: Path | None = None
        self._already_copied = ""  # the name of a checkpoint that needs no upload
        self._changed = threading.Condition()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="checkpoint upload", daemon=True)
        self._thread.start()

    def put(self, folder: Path) -> None:
        """Queue a committed checkpoint for upload. Does not wait."""
        with self._changed:
            if self._waiting is not None and self._waiting.name != self._already_copied:
                log.warning(f"checkpoint upload: {self._waiting.name} is left out, {folder.name} is newer")
            self._waiting = folder
            self._changed.notify_all()

    def clear(self, newest: Path) -> None:
        """Remove old remote checkpoints, given that `newest` is there already. Does not wait.

        An upload does the same at its end, but a kill may have come in between, and a run that has done all its steps
        uploads no other.
        """
        with self._changed:
            self._already_copied = newest.name
            self._waiting = newest
            self._changed.notify_all()

    def busy(self) -> frozenset[str]:
        """Return the names of checkpoints that must not be removed."""
        with self._changed:
            return frozenset(p.name for p in (self._waiting, self._in_progress) if p is not None)

    def pending(self) -> list[str]:
        """Return the checkpoints whose upload failed, in this attempt or an earlier one."""
        try:
            return list(json.loads((self.root / FAILED_UPLOADS).read_text())["failed"])
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def close(self, wait: float) -> bool:
        """Wait at most `wait` seconds for uploads in progress. Return whether all checkpoints arrived."""
        until = time.monotonic() + wait
        with self._changed:
            while (self._waiting or self._in_progress) and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            queued = (self._in_progress, self._waiting)
            unfinished = [p for p in queued if p is not None and p.name != self._already_copied]
        self._end.set()
        with self._changed:
            self._changed.notify_all()
        for folder in unfinished:
            self._record_failure(folder, f"not done after {wait:.0f} s")
        return not self.pending()

    # ---- in the thread -------------------------------------------------------------------------------------------
    def _work(self) -> None:
        while (folder := self._next()) is not None:
            began = time.monotonic()
            is_copied = folder.name == self._already_copied
            problem = None if is_copied else self._upload(folder)
            if self._end.is_set():
                return  # close has reported it
            if problem is None:
                if not is_copied:
                    self.seconds.append(time.monotonic() - began)
                self._record_success(folder)
            else:
                self._record_failure(folder, problem)
            with self._changed:
                self._in_progress = None
                self._changed.notify_all()

    def _next(self) -> Path | None:
        with self._changed:
            while self._waiting is None and not self._end.is_set():
                self._changed.wait()
            if self._end.is_set():
                return None
            self._in_progress, self._waiting = self._waiting, None
            return self._in_progress

    def _upload(self, folder: Path) -> str | None:
        """Try an upload several times. Return the last error, or None if a try succeeded."""
        problem = "no try was made"
        for i in range(self.tries):
            if i and self._end.wait(self.first_wait * 2 ** (i - 1)):
                break
            try:
                self.remote.put(folder)
                return None
            except Exception as error:  # whatever a store raises must not end training
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
                log.warning(
                    f"checkpoint upload: {folder.name} to {self.remote.address}: try {i + 1} of {self.tries}: {problem}"
                )
        return problem

    def _record_success(self, folder: Path) -> None:
        self._write_failed([])  # earlier failures are older than this one
        try:
            self._retain(folder.name)
        except Exception as error:  # it costs only space there
            log.warning(f"checkpoint upload: old checkpoints under {self.remote.address} were not removed: {error}")

    def _record_failure(self, folder: Path, problem: str) -> None:
        log.error(
            f"CHECKPOINT UPLOAD FAILED: {folder.name} is not under {self.remote.address} ({problem}); training goes "
            f"on, the checkpoint is in {folder}. The next checkpoint is tried, and this one again at the next start"
        )
        self._write_failed([*self.pending(), folder.name])

    def _write_failed(self, failed: list[str]) -> None:
        try:
            state: dict[str, Any] = {"failed": failed, "to": self.remote.address, "at": time.time()}
            write_json_atomic(self.root / FAILED_UPLOADS, state)
        except OSError as error:
            log.warning(f"checkpoint upload: {FAILED_UPLOADS} cannot be written ({error})")

    def _retain(self, newest: str) -> None:
        """Remove old remote checkpoints. Nobody else uploads there, so an older one without manifest is a kill's."""
        found: list[CheckpointInfo] = []
        for name in self.remote.names():
            with contextlib.suppress(OSError, ValueError):  # what cannot be read is not removed
                found.append(self._info(name))
        stay = {newest, *to_keep(found, keep_last=self.keep[0], keep_best=self.keep[1])}
        for info in found:
            if info.folder.name not in stay and info.folder.name < newest:
                self.remote.remove(info.folder.name)
        for name in self.remote.unfinished():
            if name < newest:
                self.remote.remove_unfinished(name)

    def _info(self, name: str) -> CheckpointInfo:
        """Read the local manifest, or the remote one if the local one is gone or is being removed."""
        with contextlib.suppress(OSError, ValueError):
            return read(self.root / name)
        return self.remote.manifest(name, self.root / ".remote")
