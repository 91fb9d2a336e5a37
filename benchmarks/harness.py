"""What every benchmark here shares: alternate two sides, take medians, say where it ran, write the JSON.

A row: `value` is ours, `baseline` the other side, both in `unit`; `ratio` is ours over the baseline where larger is
better (for memory: ours over the baseline, smaller is better), none where a side may be 0 or below; `n` pairs were run;
`spread` holds the lowest and the highest ratio of a pair.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    name: str
    value: float
    unit: str
    baseline: float
    ratio: float | None
    n: int
    spread: tuple[float, float] | None


def alternate(
    name: str, ours: Callable[[], object], baseline: Callable[[], object], *, work: int, unit: str, n: int
) -> Row:
    """Time both sides in turns and compare medians; one call of each before the clock starts.

    Args:
        work: Units of work of one call (cells); the row is work per second.
    """
    ours(), baseline()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(n):
        for side, call in zip(times, (ours, baseline), strict=True):
            start = time.perf_counter()
            call()
            side.append(time.perf_counter() - start)
    mine, other = (work / statistics.median(side) for side in times)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return Row(name, mine, unit, other, mine / other, n, (min(ratios), max(ratios)))


def machine() -> str:
    """Processor, cores, memory, system, torch and its threads."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{model}, {os.cpu_count()} cores, {gib:.0f} GiB, {platform.system()}, torch {torch.__version__} "
        f"({capability}), {torch.get_num_threads()} threads"
    )


def report(rows: Sequence[Row], json_file: Path | None, **more: object) -> None:
    """Print the JSON and a table, and write the JSON where asked."""
    command = shlex.join(["python", *sys.argv])
    document = {"machine": machine(), "command": command, **more, "rows": [asdict(row) for row in rows]}
    text = json.dumps(document, indent=1)
    print(text)
    print(table(rows))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(text + "\n")


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| row | ours | plain | unit | ratio | lowest – highest | n |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        ratio = "–" if r.ratio is None else f"{r.ratio:.2f}"
        spread = "–" if r.spread is None else f"{r.spread[0]:.2f} – {r.spread[1]:.2f}"
        lines.append(f"| {r.name} | {r.value:.4g} | {r.baseline:.4g} | {r.unit} | {ratio} | {spread} | {r.n} |")
    return "\n".join(lines)
