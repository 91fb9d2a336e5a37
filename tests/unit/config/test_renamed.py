"""Old names in job files load for one version, with a warning that names the new one."""

import pytest

from pipeline.config.io import renamed
from pipeline.config.io.loader import load_job
from pipeline.config.job import PipelineJob
from scldm.errors import InputError

JOB = "kind: line\nname: demo\ningest: {source: {type: synthetic}}\ngenerate: {n_cells: 5}\n"


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def test_the_old_kind_of_a_pipeline_loads_and_warns(job, caplog):
    assert isinstance(load_job(job), PipelineJob)
    assert load_job(job).kind == "pipeline"
    assert f"{job}:1: kind: line is now called kind: pipeline" in caplog.text


def test_a_renamed_setting_is_read_under_its_new_name(job, caplog, monkeypatch):
    monkeypatch.setattr(renamed, "SETTINGS", {"train.micro": "max_steps"})
    loaded = load_job(job, ["train_vae.train.micro=7"])
    assert loaded.train_vae.train.max_steps == 7
    assert "train_vae.train.micro is now called train_vae.train.max_steps" in caplog.text
    assert "(command line)" in caplog.text


def test_an_old_and_a_new_name_together_are_an_error(job, monkeypatch):
    monkeypatch.setattr(renamed, "SETTINGS", {"train.micro": "max_steps"})
    with pytest.raises(InputError, match=r"is now called .*max_steps, and both"):
        load_job(job, ["train_vae.train.micro=7", "train_vae.train.max_steps=8"])
