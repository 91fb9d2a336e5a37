"""Progress within unfinished shards, and how often each was started: small files in the shards' folder.

The files are hints: nothing waits for them, and losing one loses no cell.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.core.progress import ProgressWriter

EVERY_SECONDS = 1.0
STALE_SECONDS = 30.0
MAX_ATTEMPTS = 5


class ShardProgress:
    """Actor side: writes the number of cells of a shard that are done."""

    def __init__(self, folder: Path, shard: int, clock: Callable[[], float] = time.monotonic):
        self.path, self.clock = folder / f".shard-{shard:05d}.cells", clock
        self.n, self.written = 0, clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def add(self, n: int) -> None:
        self.n += n
        if self.clock() - self.written >= EVERY_SECONDS:
            self.written = self.clock()
            with contextlib.suppress(OSError):  # a full disk is reported by the write of the shard
                self.path.write_text(str(self.n))


class JobProgress:
    """Driver side: a thread that adds up the cells of committed and unfinished shards, with their rate.

    Args:
        root: Folder of the stage, for `progress.json`.
        folder: Folder of the shards.
        total: Cells of the job.
        done: Cells of shards that were committed before.
    """

    def __init__(self, root: Path, folder: Path, total: int, done: int):
        self.folder, self.total, self.done = folder, total, done
        self.began, self.first = time.monotonic(), done
        self.writer, self._stop = ProgressWriter(root), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="generation progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._report()

    def committed(self, n: int) -> None:
        """Add the cells of a shard that was committed."""
        self.done += n

    def cells_per_s(self) -> float:
        """Return the rate since this run began."""
        return (self.done - self.first) / max(1e-9, time.monotonic() - self.began)

    def _follow(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self._report()

    def _report(self) -> None:
        made = min(self.total, self.done + sum(map(_read, self.folder.glob(".shard-*.cells"))))
        seconds = max(1e-9, time.monotonic() - self.began)
        self.writer.update(made, self.total, cells_per_s=(made - self.first) / seconds)


def _read(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        if time.time() - path.stat().st_mtime < STALE_SECONDS:  # older: left by an actor that died
            return int(path.read_text())
    return 0


def count_attempt(folder: Path, shard: int, run: str) -> None:
    """Count an attempt at a shard in this run of the job: Ray restarts dead actors without a limit, this sets one.

    Raises:
        RuntimeError: the shard was started MAX_ATTEMPTS times before.
    """
    path = folder / f".shard-{shard:05d}.attempts"
    before: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        before = json.loads(path.read_text())
    n = before.get("n", 0) + 1 if before.get("run") == run else 1
    if n > MAX_ATTEMPTS:
        raise RuntimeError(
            f"shard {shard} was started {MAX_ATTEMPTS} times and its actor died each time (most often: out of memory). "
            "Lower shard_size or batch_size, or give actors more memory; the same command then resumes"
        )
    path.write_text(json.dumps({"run": run, "n": n}))


def clear_hints(folder: Path) -> None:
    """Remove the hints of earlier attempts. The caller holds the stage's lock."""
    for pattern in (".shard-*.cells", ".shard-*.attempts"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
