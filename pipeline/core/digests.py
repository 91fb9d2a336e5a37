"""Remembers the sha256 of large files, so that a file is read for it once.

A record is one small file for each path, in `$XDG_CACHE_HOME/scldm/digests` (`~/.cache` if that is unset). It holds for
one state of the file: size, inode and both times, to the nanosecond. Records are replaced by rename, so that processes
may write at once; a record that is lost, damaged or cannot be written only means that the file is read again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from pipeline.core.files import file_digest, write_json_atomic
from pipeline.core.text import human
from scldm.errors import InputError

log = logging.getLogger(__name__)

SMALL = 1 << 20  # bytes; a smaller file is read each time
LARGE = 4 << 30  # bytes; reading a larger file is announced
SETTLED_SECONDS = 2.0  # a file that changed within this time may change again with the same times


def content_digest(path: Path, *, records: Path | None = None) -> str:
    """Return the sha256 of a file's content; a large file is read only if it has changed since it was last read.

    Args:
        records: Folder of the records; None takes the user's cache folder.

    Raises:
        InputError: The file changes while it is read.
        OSError: The file cannot be read.
    """
    path = path.absolute()
    before = _state(path)
    if before["size"] < SMALL:
        return file_digest(path)
    record = (records or records_folder()) / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    if (known := _recorded(record, before)) is not None:
        return known
    if before["size"] >= LARGE:
        log.info("reading %s (%s) once, to know its content again", path, human(before["size"]))
    digest = file_digest(path)
    if _state(path) != before:
        raise InputError(f"{path} changed while it was read; wait until it is written, then start again")
    if time.time_ns() - max(before["mtime_ns"], before["ctime_ns"]) > SETTLED_SECONDS * 1e9:
        _remember(record, {"path": str(path), **before, "sha256": digest})
    return digest


def records_folder() -> Path:
    """Return the folder of this user's records."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scldm" / "digests"


def _state(path: Path) -> dict[str, int]:
    """Return what changes when a file does. The change time is set by the system even if a program sets the other."""
    s = path.stat()
    return {"size": s.st_size, "inode": s.st_ino, "mtime_ns": s.st_mtime_ns, "ctime_ns": s.st_ctime_ns}


def _recorded(record: Path, state: dict[str, int]) -> str | None:
    try:
        found: Any = json.loads(record.read_text())
        if {k: found[k] for k in state} == state and len(found["sha256"]) == 64:
            return str(found["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no record, or half of one: the file is read
    return None


def _remember(record: Path, value: dict[str, Any]) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(record, value)
    except OSError as error:
        log.warning("the digest of %s cannot be kept (%s): it will be read again", value["path"], error)
