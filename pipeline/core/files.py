"""Atomic writes: readers see the old file or the new one, never a part."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.faults import fault_point

TMP = ".tmp"  # ending of temporary files
REPOSITORY = Path(__file__).resolve().parents[2]
"""Folder that holds the packages: the root of a source checkout, or site-packages."""


def write_json_atomic(path: Path, value: Any) -> None:
    """Write JSON so that readers see the old file or the new one, never a part.

    The text is written to a temporary file in the same folder, flushed to disk and renamed into place.
    """
    tmp = temporary_path(path)
    try:
        tmp.write_text(json.dumps(value, indent=1))
        flush_to_disk(tmp)
        fault_point("record.before_rename")
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def replaces(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends without an error.

    The file is flushed to disk before it is renamed, so that readers see the old file or the whole new one.
    """
    tmp = temporary_path(path)
    try:
        yield tmp
        flush_to_disk(tmp)
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return a hidden name in the same folder that no other process uses: two hosts may share a folder and a pid."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{TMP}")


def flush_to_disk(path: Path) -> None:
    """Wait until the content of a closed file is on disk."""
    with path.open("rb") as f:
        os.fsync(f.fileno())


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
