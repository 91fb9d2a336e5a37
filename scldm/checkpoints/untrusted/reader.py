"""Read untrusted pickles in a child process, with `weights_only=True`, an allow-list and limits of time and memory.

Nothing that a pickle names is imported or run. Its tensors are returned as safetensors, the rest as JSON. The allowed
names are in `pickle_rules.py`; the child is `child.py`. The memory limit needs Linux.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from scldm.errors import CheckpointError

MEMORY = 2 << 30  # bytes beyond what the child needs to start; a checkpoint gets four times its own size on top
SECONDS = 900
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "TMPDIR")  # what an interpreter may need to start; no secrets


class UntrustedFileError(CheckpointError):
    """Raised for a pickle that is not read. The message names the file and the reason."""


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A Lightning checkpoint of upstream, as plain data."""

    state: dict[str, Tensor]
    about: dict[str, Any]  # epoch, global_step, hyper-parameters …; stand-ins for foreign classes as dictionaries
    left: dict[str, int]  # other contents than state_dict: name -> entries, if it is a container
    stand_ins: tuple[str, ...]  # names of foreign classes that were not constructed


def read_checkpoint(path: Path, *, seconds: int = SECONDS, memory: int | None = None) -> ForeignCheckpoint:
    """Read weights and description of a `.ckpt` file that torch or Lightning wrote.

    Args:
        path: The file.
        seconds: Time-out.
        memory: Bytes that the child may use on top of what it needs to start; default: 2 GB and four times the file.

    Raises:
        UntrustedFileError: The pickle names something that is not allowed, or the file cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="scldm-untrusted-") as folder:
        out = Path(folder)
        size = _size(path)
        answer = _run("checkpoint", path, out, seconds=seconds, memory=memory or MEMORY + 4 * size)
        state = load_file(out / "tensors.safetensors")
    state |= {name: state[first] for name, first in answer["same_memory"].items()}
    return ForeignCheckpoint(state, answer["about"], answer["left"], tuple(answer["stand_ins"]))


def read_pickle(path: Path, *, seconds: int = 60, memory: int = MEMORY) -> Any:
    """Read a plain pickle (size factors): dictionaries, lists, strings and numbers, including numpy's.

    Keys of dictionaries become strings.

    Raises:
        UntrustedFileError: As `read_checkpoint`.
    """
    with tempfile.TemporaryDirectory(prefix="scldm-untrusted-") as folder:
        return _run("plain", path, Path(folder), seconds=seconds, memory=memory)["value"]


def _size(path: Path) -> int:
    if not path.is_file():
        raise UntrustedFileError(f"{path} does not exist, or is not a file")
    return path.stat().st_size


def _run(kind: str, path: Path, out: Path, *, seconds: int, memory: int) -> dict[str, Any]:
    """Have the child read the file; return its description."""
    task = {"kind": kind, "path": str(path.resolve()), "out": str(out), "size": _size(path)}
    task |= {"seconds": seconds, "memory": memory, "paths": _library_folders()}
    script = Path(__file__).with_name("child.py")
    command = [sys.executable, "-I", "-B", str(script), json.dumps(task)]
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {"OMP_NUM_THREADS": "1"}
    try:
        child = subprocess.run(
            command, env=environment, cwd=out, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds + 30
        )
    except subprocess.TimeoutExpired:
        raise UntrustedFileError(f"{path} was not read within {seconds} s") from None
    if (refused := out / "refused.json").is_file():
        raise UntrustedFileError(f"{path} was not read: {json.loads(refused.read_text())['reason']}")
    if child.returncode or not (out / "about.json").is_file():
        raise UntrustedFileError(f"{path} was not read: {_failure_reason(child, seconds, memory)}")
    return json.loads((out / "about.json").read_text())


def _failure_reason(child: subprocess.CompletedProcess[bytes], seconds: int, memory: int) -> str:
    if child.returncode == -signal.SIGXCPU:
        return f"it took more than {seconds} s of CPU time"
    last = (child.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    return f"the reader ended with {child.returncode} (limit {memory >> 20} MB): {last[:300]}"


def _library_folders() -> list[str]:
    """Return the folders of torch, safetensors and numpy: `python -I` ignores PYTHONPATH."""
    found = (importlib.util.find_spec(name) for name in ("torch", "safetensors", "numpy"))
    return sorted({str(Path(spec.origin).parents[1]) for spec in found if spec is not None and spec.origin})
