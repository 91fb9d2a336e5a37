"""Row S7: untrusted names in what a browser or MLflow shows. The report is in `test_report.py`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.models.small_models import write_vae

import scldm
from pipeline.stages.training.model_card import model_card as card_of_a_stage
from pipeline.tracking.provenance import note
from scldm.api.hub.model_card import model_card
from scldm.config import StrictModel
from scldm.data.vocabulary import LabelVocabulary

pytestmark = pytest.mark.row("S7")
EVIL = ("<script>alert(1)</script>", "`</code><img src=x onerror=alert(1)>", "a\n# b\n---", "\x1b[2J\u202ex", "```")


class Settings(StrictModel):
    label: str = "```\n<script>alert(1)</script>"


def shows_no_markup(text: str) -> None:
    """Outside of fences no tag and no control character."""
    outside = "\n".join(text.split("```")[::2])
    assert "<script" not in outside
    assert "<img" not in outside
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_classes_and_labels_in_the_card_of_a_model_are_text(tmp_path):
    write_vae(tmp_path / "vae", LabelVocabulary(EVIL[0], EVIL))
    text = model_card(scldm.load(tmp_path / "vae"), f"x {EVIL[1]}")
    shows_no_markup(text)
    assert "&lt;script>" in text
    assert text.count("\n---") == 1  # the end of the YAML head: no class begins another


def test_the_card_of_a_stage_is_text():
    facts = {"source": f"h5ad {EVIL[0]}", "digest": "a", "n_cells": {"train": 1}, "n_genes": 2, "labels": list(EVIL)}
    ingest = SimpleNamespace(
        facts=facts, config={"source": {"organism": EVIL[1]}, "split": {"by": EVIL[2]}}, version="v"
    )
    text = card_of_a_stage("vae", Settings(), {"ingest": ingest})  # type: ignore[dict-item]
    shows_no_markup(text)
    assert text.count("```") == 2


def test_the_note_of_a_run_is_text():
    tags = {"scldm.stage": "ingest", "scldm.version": "abc", "scldm.census_version": EVIL[0], "scldm.data_digest": "d",
            "scldm.output_uri": f"/data/{EVIL[1]}"}  # fmt: skip
    inputs = {"ingest": {"version": "v"}}
    shows_no_markup(note(tags, inputs, experiment_id="1"))  # type: ignore[arg-type]
