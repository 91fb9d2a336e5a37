"""Runs a function in a child process of this one: what a job without Ray does in place of workers and actors.

    for record in in_child(make_shards, spec, shards, resources=resources, folder=folder): ...

The function is a generator that is importable by name; what it yields is sent back pickled, and so is its error. The
child ends with this process, however that ends: it watches its standard input, which only this process holds open.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from pipeline.config.resources import ResourcesConfig, threads_per_worker
from pipeline.core.files import REPOSITORY

Item = TypeVar("Item")
WORKER_LOG = "worker.log"
SHOWN = 20  # last lines of the log in the error of a child that died
WAIT = 10.0  # seconds that a child gets to end after its last item


class ChildDied(RuntimeError):
    """A child process ended without a result: it was killed, or ran out of memory."""


def in_child(
    function: Callable[..., Iterator[Item]], *args: Any, resources: ResourcesConfig, folder: Path
) -> Iterator[Item]:
    """Yield what `function(*args)` yields in a child process.

    Args:
        resources: Its threads; without GPUs the child sees none.
        folder: Of the stage; what the child prints is appended to worker.log there.

    Raises:
        ChildDied: The child ended without a result.
        Exception: What the function raised, with its traceback as a note.
    """
    log = folder / WORKER_LOG
    read, write = os.pipe()
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cluster.child", str(write)], stdin=subprocess.PIPE, stdout=output,
            stderr=subprocess.STDOUT, pass_fds=(write,), env=environment(resources),
            start_new_session=True,  # Ctrl-C in a terminal is this process's affair
        )  # fmt: skip
    os.close(write)
    assert child.stdin is not None
    try:
        with os.fdopen(read, "rb") as items:
            _send(child.stdin, (function, args))
            while (item := _next(items, child, log)) is not None:
                yield item[0]
        child.wait(WAIT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _end(child)
        _close(child.stdin)


def environment(resources: ResourcesConfig) -> dict[str, str]:
    """Return the environment of a child: as of a Ray worker with the same resources."""
    env = dict(os.environ)
    env["OMP_NUM_THREADS"] = str(threads_per_worker(resources))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH")]))
    if resources.gpus_per_worker == 0:
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return env


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child, unless it has ended well, and the processes that it started: it leads a group of its own."""
    if child.returncode == 0:
        return
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _send(stdin: IO[bytes], call: Any) -> None:
    try:
        pickle.dump(call, stdin)
        stdin.flush()
    except BrokenPipeError:
        return  # it died; the next read says so


def _next(items: IO[bytes], child: subprocess.Popen[bytes], log: Path) -> tuple[Any] | None:
    """Return the next item in a tuple; None at the end."""
    try:
        kind, value = pickle.load(items)
    except EOFError:
        code = child.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        last = log.read_text(errors="replace").splitlines()[-SHOWN:]
        raise ChildDied(
            "\n".join([f"the process that did the work ended with {how} (its log: {log})", *last])
        ) from None
    if kind == "error":
        raise value
    return (value,) if kind == "item" else None


def _close(stream: IO[bytes]) -> None:
    try:
        stream.close()
    except BrokenPipeError:
        return  # nobody reads what was left in the buffer


# ---- in the child ------------------------------------------------------------------------------------------------
def main(write: int) -> None:
    """Run the call that arrives on standard input, and send what it yields through a pipe."""
    with os.fdopen(write, "wb") as items:
        try:
            function, args = pickle.load(sys.stdin.buffer)
            threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
            for item in function(*args):
                _answer(items, "item", item)
            _answer(items, "end", None)
        except Exception as error:
            error.add_note("in the child process:\n" + traceback.format_exc())
            _answer(items, "error", _portable(error))


def _answer(items: IO[bytes], kind: str, value: Any) -> None:
    pickle.dump((kind, value), items)
    items.flush()


def _portable(error: Exception) -> Exception:
    """Return the error, or one with its words if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        told = RuntimeError(f"{type(error).__name__}: {error}")
        for note in error.__notes__:
            told.add_note(note)
        return told
    return error


def _end_with_parent() -> NoReturn:
    """Wait until the parent has closed its end of standard input, which its death does too; take our children along."""
    while os.read(sys.stdin.fileno(), 1):  # not by its buffer, whose lock would be held when the interpreter ends
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
