"""Fault points: nothing without the variable, the named time and no other with it, and no point that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline import faults
from pipeline.faults import POINTS, FaultError, arm, fault_point, parse

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def disarmed():
    yield
    arm("")


def test_a_fault_happens_at_its_time_and_only_then():
    arm("generate.before_record:n=2:raise")
    fault_point("generate.before_record")
    fault_point("generate.before_rename")
    with pytest.raises(FaultError, match=r"generate.before_record, time 2"):
        fault_point("generate.before_record")
    fault_point("generate.before_record")


def test_the_environment_is_read_once(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "generate.before_record:raise")
    monkeypatch.setattr(faults, "_armed", None)
    with pytest.raises(FaultError):
        fault_point("generate.before_record")
    monkeypatch.setenv(faults.VARIABLE, "generate.before_rename:raise")
    fault_point("generate.before_rename")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("generate.nowhere:kill", "no fault point 'generate.nowhere'"),
        ("generate.before_record", "names no action"),
        ("generate.before_record:n=0:kill", "'n=0'"),
        ("generate.before_record:explode", "'explode'"),
    ],
)
def test_a_fault_that_cannot_happen_is_refused(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(text)


def test_every_point_that_is_listed_is_passed_somewhere_and_the_other_way_round():
    passed = {
        name
        for path in (ROOT / "pipeline").rglob("*.py")
        for name in re.findall(r'fault_point\(\s*"([a-z_.]+)"', path.read_text())
    }
    assert passed == set(POINTS)
