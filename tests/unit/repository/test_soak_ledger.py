"""What a soak says of cells, steps done again, recovery and goodput, on records small enough to check by eye."""

from __future__ import annotations

import json

import pytest
from soak_ledger import Ledger


def row(step: int, pid: int, at: float, cells: list[int], rank: int = 0) -> dict:
    return {"step": step, "rank": rank, "start": 0, "pid": pid, "at": at, "cells": cells}


# Four cells, an epoch of two steps, two workers. Both are killed in step 2 (time 12); step 2 is begun again at 20.
ROWS = [
    row(0, 1, 10.0, [0]), row(0, 2, 10.0, [1], 1), row(1, 1, 11.0, [2]), row(1, 2, 11.0, [3], 1),
    row(2, 1, 11.5, [3]), row(2, 3, 20.0, [3]), row(2, 4, 20.0, [0], 1), row(3, 3, 20.4, [1]), row(3, 4, 20.4, [2], 1),
]  # fmt: skip


def test_a_step_that_was_done_again_counts_once():
    ledger = Ledger(reversed(ROWS))
    assert ledger.done_again() == 1
    assert ledger.doubled_and_missing(4, batch=2, n_cells=4) == (0, 0)
    assert sorted(ledger.cells(4)[2]) == [0, 3]


def test_a_cell_that_came_twice_and_one_that_never_came_are_seen():
    wrong = [*ROWS[:-1], row(3, 4, 20.4, [1], 1)]
    assert Ledger(wrong).doubled_and_missing(4, batch=2, n_cells=4) == (1, 1)
    assert Ledger(wrong).doubled_and_missing(3, batch=2, n_cells=4) == (0, 0), "before it happened"
    early = [*ROWS[:5], row(2, 3, 20.0, [3]), row(2, 4, 20.0, [3], 1)]
    assert Ledger(early).doubled_and_missing(3, batch=2, n_cells=4) == (1, 1), "in an epoch that is under way"


def test_recovery_is_the_first_step_of_a_worker_that_was_not_there():
    ledger = Ledger(ROWS)
    assert ledger.recovered_after(12.0) == pytest.approx(8.0)
    assert ledger.recovered_after(11.2) == pytest.approx(8.8), "what the dying one still did is none"
    assert ledger.recovered_after(30.0) is None


def test_a_step_takes_what_the_middle_one_takes():
    assert Ledger(ROWS).seconds_a_step() == pytest.approx(0.5)  # 1.0, 0.5, 0.4


def test_a_line_cut_by_a_kill_is_left_out(tmp_path):
    lines = [json.dumps(r) for r in ROWS]
    (tmp_path / "cells-0-1.jsonl").write_text("\n".join(lines)[:-5])
    assert len(Ledger.read(tmp_path).rows) == len(ROWS) - 1
