"""How long a run under Ray takes from a kill to its next step, or its next shard."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 400
ALREADY = 2.0  # seconds in which one that is not killed may still write what it was about to write


class Recoveries:
    """Seconds by kind of kill, for a test's record: `{"worker": [31.2], "node": [44.0, 40.1]}`."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def steps(self, kind: str, folder: Path, since: float | None = None) -> None:
        """Wait for the first step of training after a kill that was just now, or at `since`.

        By progress.json, which is written once a second: that is how exact it is.

        Args:
            folder: Of a stage, with a folder for each version.
        """
        since = time.time() if since is None else since
        self._wait(kind, since, lambda: _newest_progress(folder), ALREADY)

    def shard(self, kind: str, path: Path) -> None:
        """Wait for the record of a shard whose maker was killed just now."""
        since, record = time.time(), path.with_name(f"{path.name}.json")
        self._wait(kind, since, lambda: record.stat().st_mtime if record.exists() else 0.0)

    def _wait(self, kind: str, since: float, newest: Callable[[], float], already: float = 0.0) -> None:
        until = time.monotonic() + PATIENCE
        while (at := newest()) <= since + already:
            assert time.monotonic() < until, f"nothing goes on after the kill of {kind}"
            time.sleep(0.1)
        self.seconds.setdefault(kind, []).append(round(at - since, 1))


def _newest_progress(folder: Path) -> float:
    found = []
    for path in folder.glob("*/progress.json"):
        try:
            found.append(float(json.loads(path.read_text())["at"]))
        except (OSError, ValueError):
            continue  # it is being renamed
    return max(found, default=0.0)
