"""Row S8: `make audit` fails for a known hole, and says so where it could not look."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.row("S8")


@pytest.fixture(scope="module")
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "tests" / "audit.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def test_a_hole_is_a_failure_that_names_the_mend(audit):
    hole = {"id": "PYSEC-2026-1", "fix_versions": ["1.2.4"], "aliases": []}
    found = [{"name": "a", "version": "1.2.3", "vulns": [hole]}, {"name": "b", "version": "1", "vulns": []}]
    code, text = audit.verdict(found, "")
    assert code == 1
    assert "a 1.2.3: PYSEC-2026-1, mended in 1.2.4" in text
    assert "1 known holes in 2 packages" in text
    assert audit.verdict(found[1:], "")[0] == 0


def test_what_was_not_looked_at_is_not_called_sound(audit):
    assert audit.verdict(None, "ConnectionError: no route") == (
        0, "audit skipped: the list of known holes cannot be reached from here (ConnectionError: no route)"
    )  # fmt: skip
    assert audit.verdict(None, "No module named pip_audit") == (1, "pip-audit failed: No module named pip_audit")
    unknown = [{"name": "a", "skip_reason": "not found"}, {"name": "b", "skip_reason": "not found"}]
    assert audit.verdict(unknown, "")[1] == "audit skipped: what can be reached from here knows none of the 2 packages"
    some = [*unknown, {"name": "c", "version": "1", "vulns": []}]
    assert audit.verdict(some, "") == (0, "2 could not be looked up: a, b\n0 known holes in 1 packages")


def test_every_pin_is_asked_about(audit):
    pins = audit.pinned(ROOT / "constraints.txt")
    assert len(pins) > 150
    assert all(pin.count("==") == 1 and " " not in pin for pin in pins)
