"""The files from which a run in MLflow can be completed at any later time.

`tracking_log.jsonl` (driver) and `tracking_log.worker.jsonl` (rank 0 of a training) hold one JSON object per line:
params, tags, metrics, data sets, artifacts and status, each with the time at which it was logged. The points of a
training are not repeated there: they are in `metrics.jsonl`, which training writes anyway. Logs are only appended to.

Version 0.1.0 kept what it could not deliver in `mlflow_spool*.jsonl`, in the same line format; these are read too.
"""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.tracking.mlflow_runs.client import clean_metrics

log = logging.getLogger(__name__)
Record = dict[str, Any]  # kind, value, at (ms since the epoch); of metrics also step
DRIVER_LOG = "tracking_log.jsonl"
WORKER_LOG = "tracking_log.worker.jsonl"
METRICS = "metrics.jsonl"
# As 0.1.0 named them: undelivered, taken by a process that was killed, refused.
SPOOLS = ("mlflow_spool*.jsonl", ".mlflow_spool*.jsonl.*", "refused.mlflow_spool*.jsonl")
PARENT_SPOOL = "mlflow_parent.jsonl"  # in the pipeline's folder


class RecordLog:
    """Append records to one file, which no other process writes.

    The file stays open: a record is one call of the system. Each call lets another thread of this process run, and a
    training that logs beside a busy sender would wait for it several times.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None  # descriptor, after the first record
        self._warned = False

    def append(self, record: Record) -> None:
        """Append a record. A failure (a full disk) is logged once and never raised."""
        line = (json.dumps(record) + "\n").encode()
        try:
            if self._file is None:
                self._file = self._open()
            if os.write(self._file, line) < len(line):  # as on a disk that fills up: the next record ends this line
                os.write(self._file, b"\n")
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s): MLflow gets only what it can take now", self.path, error)
            self._warned = True

    def _open(self) -> int:
        """Open the file, and end the half line that a killed process may have left."""
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, file)
        if os.fstat(file).st_size:
            os.write(file, b"\n")
        return file


def read_logs(folder: Path, *names: str) -> list[Record]:
    """Return the records of a stage's folder in the order in which they were logged.

    Args:
        names: Files to read; default: the logs of all processes, metrics.jsonl, and the spools of version 0.1.0.
    """
    paths = [folder / name for name in names or (DRIVER_LOG, WORKER_LOG, METRICS)]
    records = [r for path in paths for r in (_points(path) if path.name == METRICS else _rows(path))]
    if not names:
        records += [r for path in spools(folder) for r in _rows(path)]
    return sorted((r for r in records if "kind" in r and "at" in r), key=lambda r: int(r["at"]))


def spools(folder: Path) -> list[Path]:
    """Return files of undelivered records that version 0.1.0 left."""
    return sorted(path for pattern in SPOOLS for path in folder.glob(pattern))


def last_status(records: Iterable[Record]) -> Record | None:
    """Return the newest status record; None if there is none."""
    return next((r for r in reversed(list(records)) if r["kind"] == "status"), None)


def _points(path: Path) -> Iterator[Record]:
    """Yield the points of a training. Files of version 0.1.0 hold no times: their points get the file's."""
    for row in _rows(path):
        if "step" in row:
            at = row.get("time_ms") or path.stat().st_mtime_ns // 1_000_000
            values = clean_metrics({k: v for k, v in row.items() if k not in ("step", "time_ms")})
            yield {"kind": "metrics", "value": values, "at": at, "step": int(row["step"])}


def _rows(path: Path) -> Iterator[Record]:
    """Yield the objects of a JSONL file, without the lines that a killed process left unfinished."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
