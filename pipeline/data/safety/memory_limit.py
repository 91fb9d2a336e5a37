"""A limit on what a library may take for a stranger's file, where the file says how much that is."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")


@contextmanager
def at_most_more(n_bytes: int) -> Iterator[None]:
    """Inside, this process gets at most so many bytes more than it has; a larger wish fails as on a full machine.

    For a moment only: the limit is on all threads. Without /proc (macOS) there is none.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _has() + n_bytes if STATUS.exists() else resource.RLIM_INFINITY
    if soft != resource.RLIM_INFINITY:
        limit = soft if limit == resource.RLIM_INFINITY else min(soft, limit)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _has() -> int:
    """Private memory of this process, in bytes, as the limit counts it."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024
