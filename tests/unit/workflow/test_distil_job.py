"""A section `distil` of a pipeline: what it changes, and what is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config.io.loader import load_job, resolved_yaml
from pipeline.config.job import needs, stage_configs
from pipeline.workflow.preflight import check_settings
from scldm.errors import InputError

JOB = {
    "kind": "pipeline",
    "name": "mine",
    "ingest": {"source": {"type": "synthetic", "n_cells": 60, "n_genes": 20, "n_types": 2}, "labels": ["cell_type"]},
    "generate": {"per_label": {"cell_type": 5}},
}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(JOB))
    return path


def refused(file: Path, *settings: str) -> str:
    with pytest.raises(InputError) as error:
        check_settings(load_job(file, settings))
    return str(error.value)


def test_a_pipeline_with_the_section_generates_with_the_distilled_flow(file):
    configs = stage_configs(load_job(file, ["distil={}"]))
    assert list(configs) == ["ingest", "train_vae", "encode", "train_flow", "distil", "generate", "evaluate"]
    assert needs("generate", configs["generate"]) == ("ingest", "train_vae", "distil")
    assert needs("distil", configs["distil"]) == ("train_vae", "train_flow")


def test_it_can_generate_with_the_trained_flow_all_the_same(file):
    configs = stage_configs(load_job(file, ["distil={}", "generate.flow=train_flow"]))
    assert needs("generate", configs["generate"]) == ("ingest", "train_vae", "train_flow")


def test_a_pipeline_without_the_section_is_written_as_it_was_before_there_was_one(file):
    job = load_job(file)
    assert "distil" not in resolved_yaml(job)
    assert "flow" not in stage_configs(job)["generate"].model_dump(mode="json")


def test_the_record_of_a_run_says_the_same_job_again(file, tmp_path):
    job = load_job(file, ["distil={evaluations: 1}"])
    (tmp_path / "again.yaml").write_text(resolved_yaml(job))
    again = load_job(tmp_path / "again.yaml")
    assert stage_configs(again) == stage_configs(job)
    check_settings(again)


def test_the_distilled_flow_is_asked_for_only_where_there_is_one(file):
    with pytest.raises(InputError, match=r"add one \(distil: \{\}\), or leave generate.flow out"):
        load_job(file, ["generate.flow=distil"])
    load_job(file, ["generate.flow=distil", "distil={}"])
    load_job(file)


@pytest.mark.parametrize(
    ("settings", "message", "remedy"),
    [
        (["train_flow.flow.prediction=noise"], "predicts a noise", "train_flow.flow.prediction=velocity"),
        (
            ["train_flow.start={control: {cell_type: a}, share: 1}", "generate.flow=train_flow"],
            "share below 1", "train_flow.start.share=0.5",
        ),
        (
            ["train_flow.model.label_dropout=0", "distil.guidance=2", "generate.sampler.guidance=2"],
            "without labels", "train_flow.model.label_dropout=0.1",
        ),
        (["distil.guidance=2"], "distilled with guidance 2", "generate.sampler.guidance=2"),
        (["distil.guidance=2"], "distilled with guidance 2", "generate.flow=train_flow"),
        (["distil.guidance=2"], "distil again with distil.guidance", "distil.guidance=1"),
        (["generate.sampler.solver=rk4"], r"leave solver and steps out", "generate.sampler.solver=adams"),
    ],
)  # fmt: skip
def test_what_cannot_be_distilled_or_asked_for_is_refused_and_the_advice_leads_on(file, settings, message, remedy):
    assert message in refused(file, "distil={}", *settings)
    fixed = [*settings, remedy]
    if "share" in remedy:
        fixed.remove("generate.flow=train_flow")
    check_settings(load_job(file, ["distil={}", *fixed]))


def test_a_pipeline_distils_the_flow_that_it_trains(file):
    with pytest.raises(InputError, match=r"distil\.model names another flow than the pipeline trains"):
        load_job(file, ["distil={model: runs/other}"])


def test_a_named_flow_is_checked_before_anything_starts(file, tmp_path):
    from helpers.models.small_models import write_flow, write_vae

    from scldm.flow.config import Distilled, PathConfig

    write_vae(tmp_path / "models" / "vae")
    folder = write_flow(tmp_path / "models" / "flow", path=PathConfig(prediction="noise"))
    job = tmp_path / "distil.yaml"
    job.write_text(yaml.safe_dump({"kind": "distil", "name": "mine", "model": str(folder)}))
    assert "predicts a velocity" in refused(job)
    done = write_flow(tmp_path / "done" / "flow", distilled=Distilled(evaluations=1, guidance=1, teacher="x"))
    job.write_text(yaml.safe_dump({"kind": "distil", "name": "mine", "model": str(done)}))
    assert "this one was distilled" in refused(job)
    assert "start_from.model" in refused(file, f"train_flow.start_from={done}")
