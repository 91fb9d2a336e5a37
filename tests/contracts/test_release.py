"""What a release needs: one version, a citation, workflows that do what the Makefile does, hooks that exist."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_version_is_the_same_wherever_it_stands():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()
    named = re.compile(rf'(?i)version.*= *"{re.escape(VERSION)}"')
    written = [p for d in ("scldm", "pipeline") for p in (ROOT / d).rglob("*.py") if named.search(p.read_text())]
    assert not written, "the version is read from the installed package"


def test_the_citation_has_what_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert "arxiv.org/abs/2511.02986" in citation["references"][0]["url"]


def test_there_are_workflows():
    assert {p.stem for p in WORKFLOWS} == {"test", "docs", "release"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_calls_make_targets_and_nothing_else(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 90, name
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands, name
        for command in commands:
            program, target = command.split()
            assert program == "make", command
            assert target in TARGETS, command


def test_hooks_call_what_the_environment_has():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    for hook in config["repos"][0]["hooks"]:
        assert hook["entry"].split()[0] in (".venv/bin/ruff", ".venv/bin/scldm")


def test_make_refuses_a_python_that_the_pins_are_not_for(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")  # what `python -c` gives where the version does not do
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "venv", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Python 3.11 or 3.12" in done.stdout
    assert not (tmp_path / "venv").exists()


@pytest.mark.row("S8")
def test_actions_are_pinned_by_commit():
    """A tag can be moved to other code; a commit cannot."""
    uses = [line for path in WORKFLOWS for line in path.read_text().splitlines() if "uses:" in line]
    assert len(uses) >= 6
    assert [line for line in uses if not re.search(r"uses: [\w/-]+@[0-9a-f]{40}  # v\d", line)] == []
