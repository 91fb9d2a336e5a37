"""Functions that a child process runs; it imports them by name."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scldm.errors import InputError


def numbers(n: int) -> Iterator[int]:
    yield from range(n)


def told_environment(*names: str) -> Iterator[dict[str, str | None]]:
    yield {name: os.environ.get(name) for name in names}


def refused() -> Iterator[int]:
    yield 1
    raise InputError("cells.h5ad: not counts")


def not_portable() -> Iterator[int]:
    class Local(Exception):
        pass

    raise Local("only here")
    yield 1


def killed() -> Iterator[int]:
    print("last words", flush=True)
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


def starts_another() -> Iterator[int]:
    yield subprocess.Popen(["sleep", "600"]).pid
    time.sleep(600)


def waits(pid_file: Path) -> Iterator[Any]:
    pid_file.write_text(str(os.getpid()))
    yield os.getpid()
    time.sleep(600)
