"""Rows D of the fault matrix: what `scldm validate-data` says of a fault, and what ingest then does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from helpers.files import faulty_counts, faulty_experiments, faulty_files, faulty_tables, faulty_tenx
from helpers.files.fault_case import Case, check_ingest, check_words, params

pytestmark = pytest.mark.filterwarnings("ignore")
CASES: Sequence[Case] = [
    *faulty_counts.CASES,
    *faulty_tables.CASES,
    *faulty_files.CASES,
    *faulty_tenx.CASES,
    *faulty_experiments.CASES,
]


@pytest.mark.parametrize("case", params(CASES))
def test_a_fault_is_told_and_ingest_agrees(case, tmp_path):
    """Told with numbers, first names and a remedy; what is refused leaves nothing behind; nothing of a file is run."""
    (tmp_path / "given").mkdir()
    (tmp_path / "made").mkdir()
    path = case.make(tmp_path / "given")
    check_words(case, path)
    check_ingest(case, path, tmp_path / "made")
    assert not list(tmp_path.rglob("canary"))
