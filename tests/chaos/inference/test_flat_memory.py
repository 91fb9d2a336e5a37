"""Five times as many cells are generated in the memory that one time took."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
PROGRAM = Path(__file__).resolve().parents[3] / "benchmarks" / "generation.py"
FEW, MANY = 10_000, 50_000


def peak_mb(n_cells: int) -> float:
    """Most memory of a process that generates so many cells."""
    command = [sys.executable, str(PROGRAM), "--peak-of", str(n_cells)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout.split()[-1])


@pytest.mark.row("G9")
def test_G9_memory_does_not_grow_with_the_number_of_cells(record):
    few, many = peak_mb(FEW), peak_mb(MANY)
    assert many < 1.1 * few, f"{few:.0f} MB for {FEW:,} cells, {many:.0f} for {MANY:,}"
    record["peak_rss_mb"] = many
