"""The fault matrix: what is done to a run, what is promised, and the table of what came of it.

Tests name the rows that they prove with `@pytest.mark.row("C1")`; with SCLDM_RECORDS set each leaves a JSON in that
folder (tests/conftest.py). A row without a test stands here with the reason.

    python tests/chaos/matrix.py RECORDS                          prints the table
    python tests/chaos/matrix.py RECORDS --write docs/reliability.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROWS: dict[str, str] = {
    "T1": "SIGKILL of a training worker in a step: at most an interval is done again, the weights are the same",
    "T2": "the same for worker 0, which writes manifests, averages and MLflow's points",
    "T3": "a node dies: its workers start elsewhere, or fewer go on with the same cells in the same order",
    "T4": "the same step kills each time: the run ends with exit code 1 and says how often and where",
    "T5": "a node gives notice: a checkpoint at that very step, no step lost, no failure counted",
    "T6": "`scldm stop`, `ray job stop`, SIGTERM: a checkpoint at that very step; the same command goes on",
    "T7": "the head is lost, all nodes and the driver with it: the same command goes on in a new cluster",
    "T8": "SIGKILL of the driver: the same command goes on",
    "T9": "a worker freezes (SIGSTOP): stacks are written, the group starts again",
    "T10": "a slow worker: training waits for it, and ends the same",
    "T11": "cells that no number of workers divides: equal steps everywhere, each cell once an epoch",
    "T13": "two runs on one folder: the second is refused with the owner and its age",
    "C1": "SIGKILL at every fault point of step, checkpoint, retention and copies: what is left verifies, at most an "
    "interval is done again, weights and cells are the same",
    "C2": "a file cut, flipped, deleted or swapped: that checkpoint is passed over and named, the one before used",
    "C3": "a manifest cut or flipped anywhere: passed over; of a newer version: an error that says to upgrade",
    "C5": "a full disk: the checkpoint is given up, the ones before it stay, training goes on; the last one must fit",
    "C6": "a second place that cannot be written: refused before anything is computed",
    "C7": "a slow second place: no step waits; at most one copy flies and one waits",
    "C8": "two workers, one, two: the same cells in the same order, weights to rounding",
    "C9": "fifty checkpoints: three folders stay, always one that verifies, never without the best",
    "C10": "a checkpoint, latents or models of another configuration: refused, with both names",
    "C11": "a malicious pickle: never run",
    "C12": "models, a checkpoint and a job that version 0.1.0 wrote: they load, with the same numbers",
    "N1": "a loss or gradient that is not finite, on one worker: all leave the step out, weights stay equal",
    "N2": "it is never finite: the run ends after train.max_skipped steps and names the cells; no such weight is saved",
    "N3": "a loss a million times too large: clipped, and training comes to the loss of a run without it",
    "N4": "bf16 against fp32 on the CPU: within 0.02 of each weight over 12 steps",
    "N5": "a model that gives no numbers: generation ends with the shard and the cells, and nothing is written",
    "G1": "SIGKILL of an actor or its node in a shard: the same bytes",
    "G2": "SIGKILL of the driver at every fault point of generation, then the same command: the same bytes",
    "G3": "other batches, shards and numbers of actors: the same cells",
    "G4": "a reader while shards are written: sees none of them before the manifest lists them",
    "G5": "a full disk, a stale file handle: no damaged file under a final name; the same command goes on",
    "G6": "a shard lost or damaged after its commit: made again, and it alone",
    "G7": "no cells, one cell, a number that no shard size divides, a billion",
    "G8": "another request, other inputs: a folder of its own; shards of another input do not count",
    "M1": "MLflow is down at the start",
    "M2": "MLflow is killed in the middle and comes back",
    "M3": "MLflow accepts and never answers",
    "M4": "MLflow answers 500, 429, slowly",
    "M5": "MLflow refuses; the run was deleted",
    "M6": "a resume with other settings",
    "M7": "a flood of points",
    "M8": "odd numbers, names and lengths",
    "M9": "the artifact store takes nothing",
}  # fmt: skip

NOT_COVERED: dict[str, str] = {
    "T12": "memory limits: no test. Ray's own limits hold (object_store_memory; a worker killed for memory is T1)",
    "T14": "clocks: no test. No path or decision of training reads a clock; rank 0 names folders for all",
    "C4": "Ray's own snapshots: nothing to test, each attempt has a name of its own and never reads them",
    "G9": "flat memory of generation: measured by benchmarks/generation.py (memory_100k_vs_10k), not a test",
}

PARTLY: dict[str, str] = {
    "T10": "no number says which worker is slow",
    "C2": "there is no setting that makes a damaged checkpoint fatal; it is said in the log and not counted in MLflow",
    "N2": "the run is not rolled back and tried again with other cells: a step that was left out changed nothing",
    "N4": "100 steps on a GPU are for a machine that has one",
    "N5": "the shard is not tried again: it would be the same numbers",
    "G7": "a billion cells need no --yes; `scldm plan` says what they take, and more are refused",
}

NUMBERS = ("kills", "detect_s", "recover_s", "lost_steps", "duplicates", "missing", "goodput", "peak_rss_mb")
BEGIN, END = "<!-- the table: make chaos -->", "<!-- end of the table -->"


def records(folder: Path) -> list[dict[str, Any]]:
    """What the tests left, the oldest first."""
    return sorted((json.loads(p.read_text()) for p in folder.glob("*.json")), key=lambda r: r["at"])


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line for every row of the matrix."""
    lines = ["| row | what is done, what is promised | outcome | tests |", "|---|---|---|---|"]
    for row in sorted({*ROWS, *NOT_COVERED}, key=_order):
        if row in NOT_COVERED:
            lines.append(f"| {row} | {NOT_COVERED[row]} | not covered | |")
            continue
        mine = [r for r in found if row in r["rows"]]
        note = f". But {PARTLY[row]}" if row in PARTLY else ""
        lines.append(f"| {row} | {ROWS[row]}{note} | {_outcome(mine)} | {_tests(mine)} |")
    return "\n".join(lines)


def numbers(found: list[dict[str, Any]]) -> str:
    """Markdown: what was measured, test by test."""
    lines = [f"| row | test | {' | '.join(NUMBERS)} |", "|---|---|" + "---|" * len(NUMBERS)]
    for r in sorted(found, key=lambda r: _order(r["rows"][0])):
        if any(k in r for k in NUMBERS):
            cells = [_number(r[k]) if k in r else "" for k in NUMBERS]
            lines.append(f"| {', '.join(r['rows'])} | {r['test'].split('::')[-1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _outcome(mine: list[dict[str, Any]]) -> str:
    outcomes = [r["outcome"] for r in mine]
    if not outcomes:
        return "not run"
    if "failed" in outcomes:
        return "FAILED"
    return "skipped" if set(outcomes) == {"skipped"} else "held"


def _tests(mine: list[dict[str, Any]]) -> str:
    files: dict[str, int] = {}
    for r in mine:
        file = r["test"].split("::")[0]
        files[file] = files.get(file, 0) + 1
    return ", ".join(f"`{file}`" + (f" ({n})" if n > 1 else "") for file, n in files.items())


def _number(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _order(row: str) -> tuple[int, int]:
    return "TCNGMDS".index(row[0]), int(row[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--write", type=Path, help="a page with the marks of a table")
    args = parser.parse_args()
    found = records(args.records)
    text = f"{table(found)}\n\nMeasured, where there is a number:\n\n{numbers(found)}"
    print(text)
    if args.write is not None:
        page = args.write.read_text()
        before, rest = page.split(BEGIN)
        args.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
