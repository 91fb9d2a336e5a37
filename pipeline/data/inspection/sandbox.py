"""Reads untrusted data in a child process with a limit on its memory.

A child that cannot answer says why: it ran out of memory, it was killed by a signal, or it raised an exception, which
is a fault of the file that this code does not know, or of this code.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scldm.errors import InputError
from scldm.text import shown

_CHILD = "from pipeline.data.inspection.sandbox import child; child()"
# TileDB and torch report that there is no memory in exceptions of their own.
_NO_MEMORY = ("MemoryError", "std::bad_alloc", "out of memory", "cannot allocate memory", "unable to allocate")
Answer = Callable[[Any], Any]


def ask(question: dict[str, Any], memory_gib: float, child: str = _CHILD) -> Any:
    """Send a question to a child process and return its answer.

    Args:
        question: Fields of `Question`.
        memory_gib: Memory limit of the child.
        child: Python code of the child, which ends in a call of `serve`.

    Raises:
        InputError: The input is refused, or the child did not answer; the message says why.
    """
    with tempfile.TemporaryDirectory(prefix="scldm-") as folder:
        out = Path(folder) / "answers.json"
        order = json.dumps({"question": question, "out": str(out), "memory": int(memory_gib * 2**30)})
        # The child imports the code of the parent, wherever that was started.
        path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        done = subprocess.run([sys.executable, "-c", child], input=order, text=True, stderr=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": path}, check=False)  # fmt: skip
        if done.returncode == 0 and out.is_file():
            found = json.loads(out.read_text())
            if "refused" in found:
                raise InputError(found["refused"])
            return found["answer"]
    where = shown(question["uri"], 200)
    raise InputError(f"{where} cannot be read: {_reason(done.returncode, done.stderr, memory_gib)}")


def _reason(code: int, stderr: str, memory_gib: float) -> str:
    """Return why a child did not answer, and what to do.

    Args:
        code: Its exit code; negative for a signal.
        stderr: What it printed; of an exception, the last line is its type and text.
    """
    last = shown((stderr.strip().splitlines() or ["no message"])[-1], 300)
    if any(sign.lower() in last.lower() for sign in _NO_MEMORY):
        return f"reading it takes more memory than {memory_gib:g} GiB ({last}); allow more with --memory-gib"
    if code == -signal.SIGKILL:
        return (
            "the process that read it was killed by SIGKILL, as the system does if memory runs out; end other "
            "programs, or read it on a machine with more memory"
        )
    if code < 0:
        return (
            f"the process that read it was killed by {_signal_name(-code)} ({last}), as damaged files do to the "
            "library that reads them; copy or download the file again"
        )
    with tempfile.NamedTemporaryFile("w", prefix="scldm-error-", suffix=".log", delete=False) as log:
        log.write(stderr)
    return (
        f"reading it raised {last}, which is a fault of the file that is not foreseen, or of scldm; copy or "
        f"download the file again, and if that does not help, report this with the log: {log.name}"
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def child() -> None:
    """Run the child of validate-data."""
    from pipeline.data.inspection.examine import examine  # before the limit, which is for data, not for libraries

    serve(lambda question: [{**found.to_json(), "text": found.text()} for found in examine(question)])


def serve(answer: Answer) -> None:
    """Read a question from stdin, and write the answer, or why the input is refused, to the file that it names."""
    order = json.loads(sys.stdin.read())
    from pipeline.data.inspection.examine import Question

    if "://" not in order["question"]["uri"]:
        # Limits private memory, not the mapped files of libraries.
        resource.setrlimit(resource.RLIMIT_DATA, (order["memory"], order["memory"]))
    lists = {k: tuple(v) for k, v in order["question"].items() if isinstance(v, list)}
    question = Question(**{**order["question"], **lists})
    try:
        found = {"answer": answer(question)}
    except InputError as error:
        found = {"refused": str(error)}
    Path(order["out"]).write_text(json.dumps(found))
