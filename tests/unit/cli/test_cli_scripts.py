"""What scripts and shells ask of the command line: JSON, a version, completion, groups."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers.stages.cell_stages import models
from typer.testing import CliRunner

import scldm
from pipeline.cli.app import app
from pipeline.core.manifest import Manifest, write_manifest

ROOT = Path(__file__).resolve().parents[3]
cli = CliRunner()


def test_finished_stages_come_as_json_oldest_first(tmp_path):
    for at, stage in ((2.0, "encode"), (1.0, "ingest")):
        folder = tmp_path / stage / "v"
        folder.mkdir(parents=True)
        write_manifest(Manifest(stage, "v", str(folder), {}, {}, {"n": 1}, seconds=1.0, finished_at=at))
    result = cli.invoke(app, ["runs", "list", str(tmp_path), "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [m["stage"] for m in found] == ["ingest", "encode"]
    assert found[0]["facts"] == {"n": 1}


def test_the_version_is_that_of_the_package():
    result = cli.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, f"scldm {version('scldm-census')}")
    assert scldm.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_shells_are_offered_completion_and_people_groups():
    result = cli.invoke(app, ["--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    for words in ("--install-completion", "Jobs", "Your cells", "Clusters", "Models", "scldm init cells.h5ad"):
        assert words in result.stdout


@pytest.mark.parametrize("command", [["init"], ["config", "reference"], ["config", "schema"], ["export"]])
def test_new_commands_show_an_example(command):
    result = cli.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.stdout


def test_a_model_is_exported_with_its_card(tmp_path):
    models(tmp_path / "mine")
    command = ["export", str(tmp_path / "mine"), "--to", "huggingface", "--out", str(tmp_path / "out")]
    result = cli.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlibrary_name: scldm")
    assert scldm.load(tmp_path / "out").flow is not None
    again = cli.invoke(app, command)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert cli.invoke(app, [*command, "--force"]).exit_code == 0
