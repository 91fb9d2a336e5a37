"""Every row of the fault matrix has a test that names it, or stands among those that are not covered, and not both."""

from __future__ import annotations

import re
from pathlib import Path

from matrix import BEGIN, END, numbers, recovery, rows_of_tests, table
from matrix_rows import NOT_COVERED, PARTLY, ROWS

ROOT = Path(__file__).resolve().parents[2]
LAST = {"T": 14, "C": 12, "N": 5, "G": 9, "M": 9, "S": 9}
MATRIX = {f"{letter}{n}" for letter, last in LAST.items() for n in range(1, last + 1)}


def test_the_matrix_is_whole():
    data = {row for row in ROWS if row.startswith("D:")}
    assert len(data) >= 40
    assert (ROWS.keys() | NOT_COVERED.keys()) - data == MATRIX
    assert not ROWS.keys() & NOT_COVERED.keys()
    assert PARTLY.keys() <= ROWS.keys()


def test_every_row_has_a_test_that_names_it():
    marked = {*rows_of_tests()}
    for path in (ROOT / "tests").rglob("faulty_*.py"):
        marked.update(re.findall(r"""["'](D:[\w^-]+)["']""", path.read_text()))
    assert ROWS.keys() - marked == set()
    assert marked - ROWS.keys() == set()


def test_the_table_says_what_failed_what_did_not_run_and_what_was_measured():
    found = [
        {"rows": ["C1"], "test": "tests/a.py::test_a", "outcome": "passed", "at": 1.0, "recover_s": 1.2345},
        {"rows": ["C1", "C2"], "test": "tests/b.py::test_b", "outcome": "failed", "at": 2.0},
        {"rows": ["N1"], "test": "tests/b.py::test_c[1]", "outcome": "passed", "at": 2.0},
        {"rows": ["N1"], "test": "tests/b.py::test_c[2]", "outcome": "passed", "at": 2.0},
        {"rows": ["C7"], "test": "tests/x/test_upload.py::test_d[1]", "outcome": "passed", "at": 2.0},
        {"rows": ["C7"], "test": "tests/x/test_upload.py::test_d[2]", "outcome": "skipped", "at": 2.0},
    ]  # fmt: skip
    lines = {line.split(" | ")[0].strip("| "): line for line in table(found).splitlines()}
    assert "FAILED | `tests/a.py`, `tests/b.py`" in lines["C1"]
    assert "FAILED" in lines["C2"]
    assert "held (not run: test_loop_policies.py) | `tests/b.py` (2)" in lines["N1"]
    assert "held (1 skipped) | `tests/x/test_upload.py` (2)" in lines["C7"]
    assert "not run" in lines["T1"]
    assert "| C1 | test_a |  |  | 1.23 |" in numbers(found)


def test_the_mean_time_to_recover_is_of_all_tests_that_kill_so():
    found = [{"recover": {"node": [30.0, 50.0], "driver": [10.0]}}, {"recover": {"node": [10.0]}}, {}]
    assert recovery(found).splitlines()[2:] == ["| driver | 1 | 10.0 | 10.0 |", "| node | 3 | 30.0 | 50.0 |"]


def test_the_page_has_a_place_for_the_table_and_a_line_for_every_row():
    page = (ROOT / "docs" / "reliability.md").read_text()
    inside = page.split(BEGIN)[1].split(END)[0]
    assert {line.split("|")[1].strip() for line in inside.splitlines() if line.startswith("| ")} >= MATRIX
