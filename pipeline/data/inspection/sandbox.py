"""Reads untrusted data in a child process with a limit on its memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scldm.errors import InputError

_CHILD = "from pipeline.data.inspection.sandbox import child; child()"
Answer = Callable[[Any], Any]


def ask(question: dict[str, Any], memory_gib: float, child: str = _CHILD) -> Any:
    """Send a question to a child process and return its answer.

    Args:
        question: Fields of `Question`.
        memory_gib: Memory limit of the child.
        child: Python code of the child, which ends in a call of `serve`.

    Raises:
        InputError: the child was killed, by the file or by the memory limit.
    """
    with tempfile.TemporaryDirectory(prefix="scldm-") as folder:
        out = Path(folder) / "answers.json"
        order = json.dumps({"question": question, "out": str(out), "memory": int(memory_gib * 2**30)})
        # The child imports the code of the parent, wherever that was started.
        path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        done = subprocess.run([sys.executable, "-c", child], input=order, text=True, stderr=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": path}, check=False)  # fmt: skip
        if done.returncode == 0 and out.is_file():
            return json.loads(out.read_text())
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    raise InputError(
        f"{question['uri']} cannot be read: the process that read it ended with {ended} ({last!r}); the file is "
        f"damaged, or needs more memory than {memory_gib:g} GiB (--memory-gib)"
    )


def child() -> None:
    """Run the child of validate-data."""
    from pipeline.data.inspection.examine import examine  # before the limit, which is for data, not for libraries

    serve(lambda question: [{**found.to_json(), "text": found.text()} for found in examine(question)])


def serve(answer: Answer) -> None:
    """Read a question from stdin, and write the answer as JSON to the file that it names."""
    order = json.loads(sys.stdin.read())
    from pipeline.data.inspection.examine import Question

    if "://" not in order["question"]["uri"]:
        # Limits private memory, not the mapped files of libraries.
        resource.setrlimit(resource.RLIMIT_DATA, (order["memory"], order["memory"]))
    lists = {k: tuple(v) for k, v in order["question"].items() if isinstance(v, list)}
    question = Question(**{**order["question"], **lists})
    Path(order["out"]).write_text(json.dumps(answer(question)))
