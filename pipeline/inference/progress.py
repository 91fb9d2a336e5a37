"""How far the shards in the making are, and how often each was begun: small files beside them, which are only hints."""

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
MOST_ATTEMPTS = 5


class ShardProgress:
    """Actor side: cells of a shard so far."""

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
            with contextlib.suppress(OSError):  # a full disk must fail where it matters
                self.path.write_text(str(self.n))


class JobProgress:
    """Driver side: a thread that adds up committed cells and cells in the making, with their rate."""

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
        self._say()

    def committed(self, n: int) -> None:
        self.done += n

    def cells_per_s(self) -> float:
        return (self.done - self.first) / max(1e-9, time.monotonic() - self.began)

    def _follow(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self._say()

    def _say(self) -> None:
        made = min(self.total, self.done + sum(map(_read, self.folder.glob(".shard-*.cells"))))
        seconds = max(1e-9, time.monotonic() - self.began)
        self.writer.update(made, self.total, cells_per_s=(made - self.first) / seconds)


def _read(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        if time.time() - path.stat().st_mtime < STALE_SECONDS:  # not of an actor that died
            return int(path.read_text())
    return 0


def count_attempt(folder: Path, shard: int, run: str) -> None:
    """Count a beginning of a shard in this run of the job. Ray starts dead actors again for ever; this ends it.

    Raises:
        RuntimeError: the shard was begun MOST_ATTEMPTS times before.
    """
    path = folder / f".shard-{shard:05d}.attempts"
    before: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        before = json.loads(path.read_text())
    n = before.get("n", 0) + 1 if before.get("run") == run else 1
    if n > MOST_ATTEMPTS:
        raise RuntimeError(
            f"shard {shard} was begun {MOST_ATTEMPTS} times and its actor died each time (most often: out of memory). "
            "Lower shard_size or batch_size, or give actors more memory; the same command then goes on"
        )
    path.write_text(json.dumps({"run": run, "n": n}))


def clear_hints(folder: Path) -> None:
    """Remove what earlier attempts left: hints, and files never renamed. The caller holds the stage's lock."""
    for pattern in (".shard-*.cells", ".shard-*.attempts", ".part-*.tmp"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
