"""What a soak's workers wrote down of every step, and what follows: cells, repeated steps, recovery, seconds a step."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

PAUSE = 5.0  # seconds; a longer one between two steps of a process is no step


class Ledger:
    """Rows of `in_every_process/sitecustomize.py`: step, rank, start, pid, at, cells."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        self.rows = sorted(rows, key=lambda r: r["at"])
        # The attempt that did a step last is the one that the weights are made of. Workers are of a fixed number.
        self.last = {(r["step"], r["rank"], r["start"]): r for r in self.rows}

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        return cls(row for path in folder.glob("cells-*.jsonl") for row in _whole_lines(path))

    def cells(self, steps: int) -> dict[int, Counter[int]]:
        """Step -> cells, of the first steps."""
        found: dict[int, Counter[int]] = {step: Counter() for step in range(steps)}
        for (step, _, _), row in self.last.items():
            if step < steps:
                found[step].update(row["cells"])
        return found

    def doubled_and_missing(self, steps: int, *, batch: int, n_cells: int) -> tuple[int, int]:
        """Of the first steps: each cell once in each whole epoch; in the one under way none twice, and no step without
        its cells."""
        per_epoch = -(-n_cells // batch)
        by_step, doubled, missing = self.cells(steps), 0, 0
        for first in range(0, steps, per_epoch):
            seen: Counter[int] = Counter()
            for step in range(first, min(first + per_epoch, steps)):
                seen.update(by_step[step])
            doubled += sum(n - 1 for n in seen.values())
            missing += min(n_cells, (steps - first) * batch) - len(seen)
        return doubled, missing

    def done_again(self) -> int:
        """Steps that worker 0 began more than once, each time counted."""
        begun = {(r["step"], r["pid"]) for r in self.rows if r["rank"] == 0}
        return len(begun) - len({step for step, _ in begun})

    def recovered_after(self, when: float) -> float | None:
        """Seconds from a kill to the first step of a worker that was not there before it."""
        old = {r["pid"] for r in self.rows if r["at"] <= when}
        return next((r["at"] - when for r in self.rows if r["at"] > when and r["pid"] not in old), None)

    def seconds_a_step(self) -> float:
        """Median over all steps of worker 0, from the start of one to the start of the next."""
        begun: dict[int, dict[int, float]] = {}  # pid -> step -> when
        for r in self.rows:
            if r["rank"] == 0:
                begun.setdefault(r["pid"], {}).setdefault(r["step"], r["at"])
        gaps = [b - a for steps in begun.values() for a, b in pairwise(sorted(steps.values()))]
        return statistics.median(g for g in gaps if g < PAUSE)


def _whole_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The last line may have been cut by a kill."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
