"""The file of records that wait: appended to by one process, sent by another, killed at any moment.

Who sends a spool renames it first to a name that says who: `.mlflow_spool.jsonl.<host>-<pid>-<n>`. If that process is
killed, the file is found by that name and sent by the next one.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

log = logging.getLogger("scldm.tracking")
Record = dict[str, Any]
FORGOTTEN_SECONDS = 600.0  # after which a file that another machine took is thought to be left behind
_numbers = itertools.count()


def append(spool: Path, records: list[Record]) -> bool:
    """Add records. Whether it went well; if not, they are lost, and a warning says how many."""
    return _append(spool, "".join(json.dumps(r) + "\n" for r in records), len(records))


def _append(spool: Path, text: str, n: int) -> bool:
    try:
        with spool.open("a+b") as f:
            if f.tell() and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n":  # the half line of a killed process
                text = "\n" + text
            f.write(text.encode())
    except OSError as error:
        log.warning("tracking: %d records lost, %s: %s", n, spool, error)
        return False
    return True


def claim(spool: Path) -> Path | None:
    """Take a spool, or what another process took and left. None if it has gone."""
    name = spool.name if not spool.name.startswith(".") else spool.name[1:].rpartition(".")[0]
    taken = spool.with_name(f".{name}.{_host()}-{os.getpid()}-{next(_numbers)}")
    try:
        return spool.rename(taken)
    except OSError:
        return None


def put_back(taken: Path, spool: Path, lines: list[str]) -> bool:
    """What was not sent goes back. Always False, for the sender. Without room it stays under its other name."""
    if _append(spool, "".join(lines), len(lines)):
        taken.unlink(missing_ok=True)
    return False


def parse(lines: list[str], spool: Path) -> list[Record]:
    """Records of lines; half lines, of a process that was killed while it wrote, are left out and counted."""
    found = []
    for line in (x for x in lines if x.strip()):
        try:
            found.append(json.loads(line))
        except ValueError:
            log.warning("tracking: a damaged line of %s is left out: %.80s", spool, line)
    return found


def waiting(folder: Path, pattern: str) -> list[Path]:
    """Spools of a folder, oldest first, with those that a process took and left behind."""
    left = [p for p in folder.glob(f".{pattern}.*") if _left_behind(p)]
    return sorted([*left, *folder.glob(pattern)], key=_age)


def _left_behind(taken: Path) -> bool:
    host, _, rest = taken.suffix[1:].rpartition("-")[0].rpartition("-")
    if not rest.isdigit():
        return False
    if host != _host():
        return time.time() - _age(taken) > FORGOTTEN_SECONDS
    return int(rest) != os.getpid() and not _alive(int(rest))


def _host() -> str:
    return socket.gethostname().replace(".", "_")  # a dot ends the name of the spool


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
