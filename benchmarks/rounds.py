"""Several sides measured in rounds, each by wall clock and by CPU time over the processes that it uses.

On a machine that others use too, CPU time is the steadier of the two: it is what rows are made of here, and the clock
stands beside it. A ratio compares two sides of the same round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil
from harness import Row


@dataclass(frozen=True)
class Side:
    """One of the things compared."""

    name: str
    run: Callable[[], int]  # does the work; returns the number of cells
    tree: bool = False  # works in other processes of ours too (Ray); their daemons then count as well
    note: str = ""


@dataclass(frozen=True)
class Run:
    """One call of a side."""

    cells: int
    seconds: float
    cpu_seconds: float

    @property
    def cells_per_second(self) -> float:
        return self.cells / self.seconds

    @property
    def cells_per_cpu_second(self) -> float:
        return self.cells / self.cpu_seconds


Runs = Mapping[str, Sequence[Run]]


def in_rounds(sides: Sequence[Side], n: int) -> dict[str, list[Run]]:
    """n rounds of every side in turn, after one call of each that does not count."""
    for side in sides:
        side.run()
    found: dict[str, list[Run]] = {side.name: [] for side in sides}
    for _ in range(n):
        for side in sides:
            gc.collect()
            before, start = _cpu(side.tree), time.perf_counter()
            cells = side.run()
            seconds, after = time.perf_counter() - start, _cpu(side.tree)
            used = sum(seconds_of - before.get(pid, 0.0) for pid, seconds_of in after.items())
            found[side.name].append(Run(cells, seconds, used))
    return found


def _cpu(tree: bool) -> dict[int, float]:
    """CPU seconds so far, by process. A process that ends within a run is missed; Ray keeps its workers."""
    me = psutil.Process()
    found = {}
    for process in [me, *(me.children(recursive=True) if tree else [])]:
        try:
            found[process.pid] = sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return found


def row(name: str, runs: Runs, *, ours: str, baseline: str) -> Row:
    """Cells per CPU second of two sides; the ratio is the median over rounds."""
    pairs = [[r.cells_per_cpu_second for r in pair] for pair in zip(runs[ours], runs[baseline], strict=True)]
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    spread = (min(ratios), max(ratios))
    return Row(name, mine, "cells/CPU-s", other, statistics.median(ratios), len(ratios), spread)


def side_table(sides: Sequence[Side], runs: Runs, baseline: str) -> list[dict[str, object]]:
    """What each side took: medians, and the ratio to the baseline by CPU time and by the clock."""
    rows = []
    for side in sides:
        mine, base = runs[side.name], runs[baseline]
        by_cpu = [a.cells_per_cpu_second / b.cells_per_cpu_second for a, b in zip(mine, base, strict=True)]
        by_clock = [a.cells_per_second / b.cells_per_second for a, b in zip(mine, base, strict=True)]
        rows.append({
            "side": side.name,
            "cells": mine[0].cells,
            "cells/s": round(statistics.median(r.cells_per_second for r in mine)),
            "CPU-s per 10k cells": round(statistics.median(1e4 / r.cells_per_cpu_second for r in mine), 3),
            f"of {baseline}, CPU": round(statistics.median(by_cpu), 3),
            f"of {baseline}, clock": round(statistics.median(by_clock), 3),
            "note": side.note,
        })  # fmt: skip
    return rows


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(str(v) for v in r.values()) + " |" for r in rows)])
