"""Limits the memory that a library allocates for an untrusted file, whose size fields it believes."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")


@contextmanager
def memory_limit(n_bytes: int) -> Iterator[None]:
    """Limit the further memory of this process to `n_bytes`; a larger allocation fails as if memory were full.

    For short blocks only: the limit applies to all threads. Without /proc (macOS) there is no limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _allocated() + n_bytes if STATUS.exists() else resource.RLIM_INFINITY
    if soft != resource.RLIM_INFINITY:
        limit = soft if limit == resource.RLIM_INFINITY else min(soft, limit)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _allocated() -> int:
    """Return the private memory of this process in bytes, as the limit counts it."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024
