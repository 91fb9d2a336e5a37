"""Every row of the fault matrix has a test that names it, or stands among those that are not covered, and not both."""

from __future__ import annotations

import ast
from pathlib import Path

from matrix import BEGIN, END, NOT_COVERED, PARTLY, ROWS, numbers, table

ROOT = Path(__file__).resolve().parents[2]
MATRIX = {
    f"{letter}{n}" for letter, last in (("T", 14), ("C", 12), ("N", 5), ("G", 9), ("M", 9)) for n in range(1, last + 1)
}


def rows_of_tests() -> dict[str, list[str]]:
    """Row -> files that mark it."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "row":
                for row in node.args:
                    found.setdefault(ast.literal_eval(row), []).append(path.name)
    return found


def test_the_matrix_is_whole():
    assert ROWS.keys() | NOT_COVERED.keys() == MATRIX
    assert not ROWS.keys() & NOT_COVERED.keys()
    assert PARTLY.keys() <= ROWS.keys()


def test_every_row_has_a_test_that_names_it():
    marked = rows_of_tests()
    assert ROWS.keys() - marked.keys() == set()
    others = {row for row in marked if row[0] in "DS"}  # of inputs and of security: they name themselves
    assert marked.keys() - others - ROWS.keys() == set()


def test_the_table_says_what_failed_what_did_not_run_and_what_was_measured():
    found = [
        {"rows": ["C1"], "test": "tests/a.py::test_a", "outcome": "passed", "at": 1.0, "recover_s": 1.2345},
        {"rows": ["C1", "C2"], "test": "tests/b.py::test_b", "outcome": "failed", "at": 2.0},
        {"rows": ["N1"], "test": "tests/b.py::test_c[1]", "outcome": "passed", "at": 2.0},
        {"rows": ["N1"], "test": "tests/b.py::test_c[2]", "outcome": "passed", "at": 2.0},
    ]  # fmt: skip
    lines = {line.split(" | ")[0].strip("| "): line for line in table(found).splitlines()}
    assert "FAILED | `tests/a.py`, `tests/b.py`" in lines["C1"]
    assert "FAILED" in lines["C2"]
    assert "held | `tests/b.py` (2)" in lines["N1"]
    assert "not run" in lines["T1"]
    assert "not covered" in lines["T12"]
    assert "| C1 | test_a |  |  | 1.23 |" in numbers(found)


def test_the_page_has_a_place_for_the_table_and_a_line_for_every_row():
    page = (ROOT / "docs" / "reliability.md").read_text()
    inside = page.split(BEGIN)[1].split(END)[0]
    assert {line.split("|")[1].strip() for line in inside.splitlines() if line.startswith("| ")} >= MATRIX
