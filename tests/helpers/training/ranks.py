"""Starts training ranks as processes within a second: forked from a server that has imported everything once.

Each runs the entry point that torchrun runs, with the faults that a test names. Every micro batch that a rank trains on
is recorded, so that a test can count how often each cell was seen.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from pipeline.core.faults import VARIABLE, arm
from pipeline.core.logs import setup_logging

TESTS = Path(__file__).resolve().parents[2]
# The server of Python 3.11 knows no path but that of the environment, and passes in silence over what it cannot import.
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["helpers.training.ranks", "helpers.training.warm"])
MEMORY = 500 << 20  # of memory, for the rank of `starved`
KILLED, STOPPED, REFUSED = -signal.SIGKILL, 75, 2


def run(spec: dict[str, Any], world_size: int = 2, fault: str = "") -> list[int]:
    """Run a training and return the ranks' exit codes; `fault` has the syntax of SCLDM_FAULT."""
    folder = Path(spec["folder"])
    return start(folder, _train, world_size, fault, spec=spec)


def start(
    folder: Path, work: Callable[[Path], None], world_size: int, fault: str = "", timeout: float = 400,
    spec: dict[str, Any] | None = None,
) -> list[int]:  # fmt: skip
    """Run `work` on ranks and return their exit codes. If one fails, the others are killed, as a cluster would do."""
    folder.mkdir(parents=True, exist_ok=True)
    if spec is not None:
        (folder / "spec.json").write_text(json.dumps(spec))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    attempt = time.time_ns()
    ranks = [
        CONTEXT.Process(target=_rank, args=(folder, work, attempt, r, world_size, port, fault))
        for r in range(world_size)
    ]
    for process in ranks:
        process.start()
    until = time.monotonic() + timeout
    while any(p.is_alive() for p in ranks):
        if any(p.exitcode not in (None, 0, STOPPED, REFUSED) for p in ranks) or time.monotonic() > until:
            time.sleep(0.3)  # a rank that fails on its own has time to log it
            for p in ranks:
                p.kill()
        time.sleep(0.02)
    for p in ranks:
        p.join()
    assert time.monotonic() < until, f"the ranks hang:\n{(folder / 'log').read_text()[-3000:]}"
    return [int(p.exitcode or 0) for p in ranks]


def train(spec: dict[str, Any], world_size: int = 2) -> None:
    """Run to the end, or fail with the ranks' log."""
    codes = run(spec, world_size)
    assert codes == [0] * world_size, f"{codes}\n{(Path(spec['folder']) / 'log').read_text()[-3000:]}"


def _rank(
    folder: Path, work: Callable[[Path], None], attempt: int, rank: int, world_size: int, port: int, fault: str
) -> None:
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    os.environ[VARIABLE] = fault
    setup_logging(stage="training", rank=rank)
    arm()
    from pipeline.training.objectives.vae import VaeObjective

    record_cells(VaeObjective, folder / f"cells-{attempt}-{rank}.jsonl")
    work(folder)


def _train(folder: Path) -> None:
    from pipeline.training import worker

    sys.argv = ["worker", f"{folder}/spec.json"]
    worker.main()


def mad_clocks(folder: Path) -> None:
    """Train with clocks that are days apart and jump back and forth by an hour."""
    real, jumps = time.time, itertools.cycle((3600.0, -3600.0, 0.0))
    days = (-1) ** int(os.environ["RANK"]) * 86_400.0 * 30
    time.time = lambda: real() + days + next(jumps)  # type: ignore[assignment]
    _train(folder)


def starved(folder: Path) -> None:
    """Train with at most MEMORY bytes more than a rank has when it computes its first loss."""
    from pipeline.training.objectives.vae import VaeObjective

    original = VaeObjective.loss

    def loss(*args: Any) -> Any:
        if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
            most = psutil.Process().memory_info().vms + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        return original(*args)

    VaeObjective.loss = loss  # type: ignore[method-assign]
    _train(folder)


# ---- cells -------------------------------------------------------------------------------------------------------
def record_cells(objective: type[Any], path: Path) -> None:
    """Record every micro batch that this kind of objective computes, as a line of a file."""
    original = objective.loss

    def loss(self: Any, model: Any, batch: Any, part: Any) -> Any:
        seen = batch.joinids[batch.weight > 0].tolist()
        with path.open("a") as f:
            place = {"step": part.step, "epoch": part.epoch, "start": part.start, "at": time.time()}
            f.write(json.dumps({**place, "cells": seen}) + "\n")
        return original(self, model, batch, part)

    objective.loss = loss


def cells_by_step(folder: Path) -> dict[int, list[int]]:
    """Return the cells of every step in the attempt that did it last: those that made the final weights."""
    rows: dict[int, dict[int, list[int]]] = {}
    for file in folder.glob("cells-*.jsonl"):
        attempt = int(file.stem.split("-")[1])
        for line in file.read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["step"], {}).setdefault(attempt, []).extend(row["cells"])
    return {step: sorted(attempts[max(attempts)]) for step, attempts in sorted(rows.items())}


def times_begun(folder: Path) -> Counter[int]:
    """Return how many attempts began each step."""
    begun: Counter[int] = Counter()
    for file in folder.glob("cells-*-0.jsonl"):
        begun.update({json.loads(line)["step"] for line in file.read_text().splitlines()})
    return begun
