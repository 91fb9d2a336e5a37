"""The fault matrix as a table of what came of it.

Tests name the rows that they prove with `@pytest.mark.row("C1")`; with SCLDM_RECORDS set each leaves a JSON in that
folder (tests/conftest.py). A row without a test stands in matrix_rows.py with the reason.

    python tests/chaos/matrix.py RECORDS                          prints the table
    python tests/chaos/matrix.py RECORDS --write docs/reliability.md
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matrix_rows import NOT_COVERED, PARTLY, ROWS

NUMBERS = ("kills", "detect_s", "recover_s", "lost_steps", "duplicates", "missing", "goodput", "peak_rss_mb")
TESTS = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- the table: make chaos -->", "<!-- end of the table -->"


def records(folder: Path) -> list[dict[str, Any]]:
    """What the tests left, the oldest first."""
    return sorted((json.loads(p.read_text()) for p in folder.glob("*.json")), key=lambda r: r["at"])


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line for every row of the matrix."""
    lines = ["| row | what is done, what is promised | outcome | tests |", "|---|---|---|---|"]
    marked = rows_of_tests()
    for row in sorted({*ROWS, *NOT_COVERED}, key=_order):
        if row in NOT_COVERED:
            lines.append(f"| {row} | {NOT_COVERED[row]} | not covered | |")
            continue
        mine = [r for r in found if row in r["rows"]]
        note = f". But {PARTLY[row]}" if row in PARTLY else ""
        lines.append(f"| {row} | {ROWS[row]}{note} | {_outcome(mine, marked.get(row, []))} | {_tests(mine)} |")
    return "\n".join(lines)


def numbers(found: list[dict[str, Any]]) -> str:
    """Markdown: what was measured, test by test."""
    lines = [f"| row | test | {' | '.join(NUMBERS)} |", "|---|---|" + "---|" * len(NUMBERS)]
    for r in sorted(found, key=lambda r: _order(r["rows"][0])):
        kinds = list(r.get("recover", {}).values())
        if len(kinds) == 1:  # those of several stand in the table of recoveries, each by itself
            r = {"recover_s": statistics.mean(kinds[0]), **r}
        if any(k in r for k in NUMBERS):
            cells = [_number(r[k]) if k in r else "" for k in NUMBERS]
            lines.append(f"| {', '.join(r['rows'])} | {r['test'].split('::')[-1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recovery(found: list[dict[str, Any]]) -> str:
    """Markdown: from each kind of kill to the next step, over all tests that measured it."""
    seconds: dict[str, list[float]] = {}
    for r in found:
        for kind, values in r.get("recover", {}).items():
            seconds.setdefault(kind, []).extend(values)
    lines = ["| killed | times | mean, s | most, s |", "|---|---|---|---|"]
    for kind, values in sorted(seconds.items(), key=lambda item: statistics.mean(item[1])):
        lines.append(f"| {kind} | {len(values)} | {statistics.mean(values):.1f} | {max(values):.1f} |")
    return "\n".join(lines)


def _outcome(mine: list[dict[str, Any]], files: Iterable[str]) -> str:
    """Of a row by its records; `files` are those with a test that is marked with it."""
    outcomes = [r["outcome"] for r in mine]
    if not outcomes:
        return "not run"
    if "failed" in outcomes:
        return "FAILED"
    if set(outcomes) == {"skipped"}:
        return "skipped"
    left = sorted(set(files) - {Path(r["test"].split("::")[0]).name for r in mine})
    notes = [f"{n} skipped"] if (n := outcomes.count("skipped")) else []
    notes += [f"not run: {', '.join(left)}"] if left else []
    return f"held ({'; '.join(notes)})" if notes else "held"


def rows_of_tests() -> dict[str, list[str]]:
    """Row -> files with tests that are marked with it. Cases in tables (rows D) carry theirs."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "row":
                for row in node.args:
                    found.setdefault(ast.literal_eval(row), []).append(path.name)
    return found


def _tests(mine: list[dict[str, Any]]) -> str:
    files: dict[str, int] = {}
    for r in mine:
        file = r["test"].split("::")[0]
        files[file] = files.get(file, 0) + 1
    return ", ".join(f"`{file}`" + (f" ({n})" if n > 1 else "") for file, n in files.items())


def _number(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _order(row: str) -> tuple[int, int, str]:
    """T1, T2, …, T14, C1, …; rows D have names."""
    number = row[1:]
    return "TCNGMDS".index(row[0]), int(number) if number.isdigit() else 0, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--write", type=Path, help="a page with the marks of a table")
    args = parser.parse_args()
    found = records(args.records)
    text = "\n\n".join(
        [
            table(found),
            "Measured, where there is a number:",
            numbers(found),
            "From one kill of each kind, or two, to the next step or to what is named:",
            recovery(found),
        ]
    )
    print(text)
    if args.write is not None:
        page = args.write.read_text()
        before, rest = page.split(BEGIN)
        args.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
