"""docs/configuration.md is what the models say, and every setting says what it means and what it counts."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config.io.reference import numbers, reference, undescribed
from pipeline.config.io.units import UNITS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == reference(), "run: scldm config reference -o docs/configuration.md"


def test_every_setting_has_a_meaning():
    assert not list(undescribed()), "write a text under the setting in its model"


def test_every_number_has_a_unit():
    lacking = sorted({f"{path} ({name})" for path, name in numbers() if name not in UNITS})
    assert not lacking, 'add it to pipeline/config/io/units.py; "1" if it has none'


def test_a_setting_is_shown_with_type_default_unit_and_meaning():
    [row] = [line for line in reference().splitlines() if line.startswith("| `shard_size`") and "25000" in line][:1]
    assert row == "| `shard_size` | an integer ≥ 1 and ≤ 250,000 | `25000` | cells | Cells per file. |"


def test_the_schema_is_that_of_a_job(tmp_path):
    result = CliRunner().invoke(app, ["config", "schema", "-o", str(tmp_path / "schema.json")])
    assert result.exit_code == 0
    schema = json.loads((tmp_path / "schema.json").read_text())
    assert schema["discriminator"]["mapping"].keys() >= {"pipeline", "generate", "perturb"}
