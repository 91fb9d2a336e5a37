"""Row S9: no version with a known hole can be installed beside us, and the pins are above the floors."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {
    "torch": "2.10",  # weights_only=True could be got round before
    "ray": "2.54",  # tokens
    "mlflow": "3.17",  # host checks, jobs of others
    "numcodecs": "0.16.6",  # its pickle codec refuses to decode
    "pyarrow": "14.0.1",  # extension types were unpickled
    "anndata": "0.11",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
pytestmark = pytest.mark.row("S9")


@pytest.mark.parametrize("name", FLOORS)
def test_the_pin_is_above_the_floor(name):
    assert Version(PINS[name]) >= Version(FLOORS[name])


@pytest.mark.parametrize("name", ["torch", "ray", "mlflow", "pyarrow", "anndata"])
def test_what_we_ask_for_leaves_out_what_is_below(name):
    extras = [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    asked = [Requirement(r) for r in (*PROJECT["dependencies"], *extras)]
    ours = next(r for r in asked if r.name == name)
    below = f"{Version(FLOORS[name]).major}.{max(0, Version(FLOORS[name]).minor - 1)}.99"
    if Version(FLOORS[name]).minor:
        assert not ours.specifier.contains(below)
    assert ours.specifier.contains(PINS[name])
