"""Lock a stage folder, so that one live process at a time writes it.

The lock is a file that names its owner; its modification time is the heartbeat. On one machine (one pid namespace) the
owner's pid and start time decide whether it lives; from elsewhere only the heartbeat can. Clocks of two machines may
differ, so a heartbeat that looks old is watched for a while before it counts as stale. A stale lock is renamed, which
only one of several competing processes can do.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scldm.errors import InputError

log = logging.getLogger(__name__)
LOCK = "lock.json"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


@contextmanager
def stage_lock(folder: Path, report: Callable[[str], None] = log.warning) -> Iterator[None]:
    """Hold the folder's lock.

    Args:
        report: Called with a message if the lock of a dead process is taken over.

    Raises:
        InputError: Another live process holds it.
    """
    path = folder / LOCK
    token = uuid.uuid4().hex
    _acquire(path, token, report)
    stop = threading.Event()
    threading.Thread(target=_beat, args=(path, stop), name="lock heartbeat", daemon=True).start()
    try:
        yield
    finally:
        stop.set()
        if (_read(path) or {}).get("token") == token:
            path.unlink(missing_ok=True)


def _acquire(path: Path, token: str, report: Callable[[str], None]) -> None:
    owner = {"token": token, "pid": os.getpid(), "started": _started(os.getpid()), "host": _host(), "at": time.time()}
    for _ in range(3):
        with contextlib.suppress(FileExistsError):
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY), "w") as f:
                json.dump(owner, f)
            return
        with contextlib.suppress(FileNotFoundError):  # released, or taken over, meanwhile
            holder, age = _read(path) or {}, time.time() - path.stat().st_mtime
            if _is_alive(path, holder, age):
                raise InputError(
                    f"{path.parent} is being written by process {holder.get('pid')} on {holder.get('host')} "
                    f"(last heartbeat {age:.0f} s ago). Wait for it or stop it; a lock without an owner is taken "
                    f"over after {STALE_SECONDS:.0f} s"
                )
            aside = path.with_name(f".{LOCK}.{token}")
            path.rename(aside)
            aside.unlink()
            report(f"took over the lock of {path.parent}: process {holder.get('pid')} on {holder.get('host')} is gone")
    raise InputError(f"{path}: another process is acquiring this lock at the same moment; run again")


def _is_alive(path: Path, holder: dict[str, Any], age: float) -> bool:
    if holder.get("host") == _host():
        started = _started(int(holder.get("pid", 0)))
        return started is not None and started == holder.get("started")
    if 0 <= age < STALE_SECONDS:
        return True
    # A time in the future tells nothing about its age.
    return _beats(path, STALE_SECONDS if age < 0 else 2.2 * BEAT_SECONDS)


def _beats(path: Path, seconds: float) -> bool:
    """Return whether there is a heartbeat within some seconds of this machine's own clock."""
    before, until = path.stat().st_mtime_ns, time.monotonic() + seconds
    while time.monotonic() < until:
        if path.stat().st_mtime_ns != before:
            return True
        time.sleep(BEAT_SECONDS / 20)
    return False


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _host() -> str:
    """Return host and pid namespace: two containers may share a host name but not their pids."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace}".strip()


def _started(pid: int) -> str | None:
    """Return the start time of a process, by which a reused pid is recognized; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    except OSError:
        pass
    if Path("/proc/self").exists():
        return None
    try:  # no /proc (macOS)
        os.kill(pid, 0)
    except OSError as error:
        return "unknown" if isinstance(error, PermissionError) else None
    return "unknown"
