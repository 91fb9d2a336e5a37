"""Runs every path and step on the pretended device, and writes what it found as JSON.

    python -m helpers.pretended.program GUARD FOLDER OUT [GROUP …]

A process of its own, because the guard is loaded before torch and stays for as long as torch does.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.pretended import library


def attempt(path: Callable[[], None]) -> dict[str, Any]:
    """Run a path on a device of its own; return its error, its seconds of CPU, and what the device was asked for."""
    from helpers.pretended.patches import pretended

    start, error = time.process_time(), None
    with pretended() as device:
        try:
            path()
        except Exception as found:
            error = f"{type(found).__name__}: {found}\n{''.join(traceback.format_tb(found.__traceback__)[-6:])}"
    return {"error": error, "seconds": round(time.process_time() - start, 2), **device.record.totals()}


def main(guard: Path, folder: Path, out: Path, *only: str) -> None:
    library.load(guard)
    import torch

    from helpers.pretended import faults, steps
    from helpers.pretended.paths import groups

    torch.set_num_threads(1)
    found: dict[str, Any] = {"paths": {}, "steps": {}}
    # Before the paths: DeepSpeed's stage 3 replaces torch's linear layer for the process, which takes more launches.
    if not only or "steps" in only:
        for name, step in steps.steps().items():
            record = steps.record(step)
            found["steps"][name] = {"totals": record.totals(), "syncs": record.syncs, "copies": record.copies}
    if not only or "faults" in only:
        found["faults"] = faults.planted(folder / "faults")
    for name, group in groups().items():
        if not only or name in only:
            at = folder / name
            at.mkdir(parents=True, exist_ok=True)
            found["paths"][name] = {path: attempt(run) for path, run in group(at).items()}
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*(Path(x) for x in sys.argv[1:4]), *sys.argv[4:])
