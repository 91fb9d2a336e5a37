"""Programs of the repository as they are started by hand: tests/gpu, the demo's job, ranks under torchrun."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from gpu_parts.plan import Budget, Measured, Outcome, Skipped
from gpu_parts.sizes import Sizes

ROOT = Path(__file__).resolve().parents[2]
DEMO_SECONDS = 100  # with less there is no use in starting it
TIMEOUT, GRACE = 124, 10  # exit code of a program that was ended; seconds that it has for it
SHORT = (
    "train_vae.train.max_steps=200", "train_flow.train.max_steps=200", "generate.n_cells=500", "evaluate.umap=false",
    "train_vae.train.validate_every=100", "train_flow.train.validate_every=100",
)  # fmt: skip


def gpu_tests(sizes: Sizes) -> Callable[[Outcome, Budget], None]:
    """Return a part that runs tests/gpu; in a rehearsal they are collected."""

    def work(outcome: Outcome, budget: Budget) -> None:
        words = ["-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        words += ["--collect-only"] if sizes.rehearsal else []
        code, said = run([sys.executable, *words], budget)
        last = said.strip().splitlines()[-1] if said.strip() else "no output"
        outcome.notes.append(last)
        for kind in ("passed", "failed", "skipped"):
            if (found := re.search(rf"(\d+) {kind}", last)) is not None:
                outcome.rows.append(Measured(f"tests.{kind}", float(found[1]), "tests"))
        if code:
            failed = re.findall(r"^(?:FAILED|ERROR) .*", said, re.MULTILINE)
            outcome.errors += failed or [said[-3000:]]

    return work


def demo(sizes: Sizes) -> Callable[[Outcome, Budget], None]:
    """Return a part that runs the demo's pipeline on one GPU, with fewer steps; in a rehearsal it is validated."""

    def work(outcome: Outcome, budget: Budget) -> None:
        if importlib.util.find_spec("ray") is None:
            raise Skipped("Ray is not installed")
        if not sizes.rehearsal and budget.left() < DEMO_SECONDS:
            raise Skipped(f"{budget.left():.0f} s are left, and it takes about {DEMO_SECONDS} s")
        with tempfile.TemporaryDirectory() as folder:
            settings = [f"output={folder}", "resources={workers: 1, actors: 1, gpus_per_worker: 1, cpus_per_worker: 2}"]
            settings += [f"{stage}.train.precision=bf16" for stage in ("train_vae", "train_flow")]
            verb = "validate" if sizes.rehearsal else "run"
            words = [sys.executable, "-m", "pipeline", verb, "jobs/demo.yaml", *settings, *SHORT]
            code, said = run(words, budget)
        lines = [line for line in said.splitlines() if line.strip()]
        outcome.notes += lines[-3:]
        for stage, rate in re.findall(r"\[?(train_\w+|generate)\b.*?([\d.]+k?) cells/s", said):
            value = float(rate.rstrip("k")) * (1000 if rate.endswith("k") else 1)
            outcome.rows = [r for r in outcome.rows if r.name != f"demo.{stage}"]  # the last line of each stage
            outcome.rows.append(Measured(f"demo.{stage}", value, "cells/s"))
        if code == TIMEOUT:
            raise Skipped(f"it did not finish in its time; the last line: {lines[-2] if len(lines) > 1 else ''}")
        if code:
            outcome.errors.append(f"exit code {code}: {said[-3000:]}")

    return work


def ranks(sizes: Sizes) -> Callable[[Outcome, Budget], None]:
    """Return a part that trains with ZeRO 0 to 3 under torchrun, on two GPUs if there are two; else on one."""

    def work(outcome: Outcome, budget: Budget) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise Skipped("DeepSpeed is not installed")
        n = 2 if sizes.rehearsal else min(2, torch.cuda.device_count())
        if n == 1:
            outcome.notes.append("one GPU: ZeRO on one worker, and NCCL between GPUs is not measured")
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "ranks.json"
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
                     str(Path(__file__).with_name("rank.py")), str(result)]  # fmt: skip
            code, said = run([*words, *(["--rehearse"] if sizes.rehearsal else [])], budget)
            if result.is_file():
                found = json.loads(result.read_text())
                outcome.rows += [Measured(**row) for row in found["rows"]]
                outcome.errors += found["errors"]
        if code:
            outcome.errors.append(f"exit code {code}: {said[-3000:]}")

    return work


def run(words: list[str], budget: Budget) -> tuple[int, str]:
    """Run a program from the repository's root; return its exit code and output. It is ended when time is over."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
    with tempfile.TemporaryFile() as log:
        started = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        seconds = max(2.0, budget.left())
        try:
            code, more = started.wait(seconds), ""
        except subprocess.TimeoutExpired:
            code, more = TIMEOUT, f"\nended after {seconds:.0f} s"
        finally:
            _end(started)
        log.seek(0)
        return code, log.read().decode(errors="replace") + more


def _end(started: subprocess.Popen[bytes]) -> None:
    """End a program with all that it started: ranks that stay would hold the GPUs."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(GRACE)
