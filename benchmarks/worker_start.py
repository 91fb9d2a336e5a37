"""How long a training worker takes from nothing to the end of its first step, with and without compiled packages.

Each start is a process of its own, without Ray: imports, DeepSpeed, one step of a small VAE on made-up cells. The two
sides take turns; "uncompiled" is what PYTHONDONTWRITEBYTECODE and an installer that compiles nothing come to: every
process compiles what it imports.

    python benchmarks/worker_start.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
         "MASTER_PORT": "29577", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip


def start(spec: Path, scratch: Path, *, compiled: bool) -> float:
    """Seconds of one worker's life."""
    shutil.rmtree(json.loads(spec.read_text())["folder"], ignore_errors=True)
    Path(json.loads(spec.read_text())["folder"]).mkdir()
    env = {**os.environ, **ALONE, "PYTHONDONTWRITEBYTECODE": "1"}
    if not compiled:
        env["PYTHONPYCACHEPREFIX"] = str(scratch / "empty")  # where no bytecode is found, and none is written
    began = time.perf_counter()
    command = [sys.executable, "-m", "pipeline.training.worker", str(spec)]
    subprocess.run(command, env=env, check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    from helpers.training.small_job import ingest_small, spec_of

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        spec = root / "spec.json"
        spec.write_text(json.dumps(spec_of(root / "run", ingest_small(root / "ingest"), max_steps=1)))
        start(spec, root, compiled=True)  # warms the disk
        sides: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(rounds):
            for compiled, seconds in sides.items():
                seconds.append(start(spec, root, compiled=compiled))
    with_, without = (statistics.median(sides[c]) for c in (True, False))
    ratios = [b / a for a, b in zip(sides[True], sides[False], strict=True)]
    print("| row | compiled | uncompiled | unit | ratio | lowest – highest | n |\n|---|---|---|---|---|---|---|")
    print(f"| worker_start | {with_:.2f} | {without:.2f} | s | {without / with_:.2f} | {min(ratios):.2f} – "
          f"{max(ratios):.2f} | {rounds} |")  # fmt: skip


if __name__ == "__main__":
    main()
