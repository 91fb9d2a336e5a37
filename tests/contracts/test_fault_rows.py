"""Rows D and S of the fault matrix have a test that names them; `test_matrix.py` holds the others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
DATA = """negative-counts non-integer non-finite duplicate-gene-ids duplicate-obs-names vocabulary-missing symbols
versioned-ids empty-cells empty-genes zero-cells one-cell fewer-cells-than-batch label-absent label-missing
unknown-category-at-generation category-in-validation-only label-types label-mixed layout x-absent above-2^24
library-size-outlier unsorted-indices explicit-zeros corrupt-h5 corrupt-10x external-link huge-declared
zarr-pickle-codec zarr-missing-chunk soma-missing-fragment soma-wrong-time path-spaces-unicode directory-for-file
other-format census-absent filter-matches-nothing s3-failures round-trip flipped-bytes fuzz"""
SECURITY = ["S1", "S3", "S4", "S5", "S6", "S7", "S8", "S9"]
ROWS = [f"D:{name}" for name in DATA.split()] + SECURITY
SOURCES = [p for kind in ("test_*.py", "faulty_*.py") for p in TESTS.rglob(kind) if p != Path(__file__)]


@pytest.fixture(scope="module")
def named() -> set[str]:
    """Rows in marks of tests, and in the tables of cases that are marked with theirs."""
    pattern = re.compile(r"""["'](D:[\w^-]+|S\d+)["']""")
    return {row for path in SOURCES for row in pattern.findall(path.read_text())}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_a_test(row, named):
    assert row in named
