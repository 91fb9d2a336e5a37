"""`Model.finetune` writes and runs a job that starts from the model: `scldm.train` with `start_from`."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from helpers.stages.cell_stages import models, real_cells

import scldm
from pipeline.cli.init.continued import read_start
from pipeline.config.io.loader import load_job
from scldm.api.arguments import ArgumentError
from scldm.api.model import load  # before a test replaces it
from scldm.errors import CheckpointError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models") / "known"
    models(root)
    return root


@pytest.fixture
def ran(monkeypatch, folder):
    """The jobs that would have run, with their overrides; the model they leave is the old one."""
    jobs = []
    monkeypatch.setattr(
        "pipeline.workflow.runner.run_job", lambda job, path, overrides, **_: jobs.append((job, path, overrides))
    )
    monkeypatch.setattr("scldm.api.model.load", lambda *_, **__: load(folder))
    return jobs


def new_cells():
    cells = real_cells(120, seed=3)
    cells.obs["cell_type"] = np.where(np.arange(120) % 2, "B", "new")
    return cells


def test_the_job_starts_from_the_model_over_its_genes(folder, ran, tmp_path, capsys):
    model = load(folder)
    short = {"train_vae.train.max_steps": 5, "train_flow.start_from.parents": {"cell_type": {"new": "T"}}}
    tuned = model.finetune(new_cells(), name="mine", output=tmp_path, settings=short, seed=4)
    assert isinstance(tuned, scldm.Model)
    assert f"sizes and first weights of {folder / 'flow'}" in capsys.readouterr().out
    [(job, path, overrides)] = ran
    written = yaml.safe_load(path.read_text())
    assert path == tmp_path / "mine" / "job.yaml"
    assert written["ingest"]["genes"] == {"vocabulary": str(folder / "vae")}
    assert written["ingest"]["labels"] == ["cell_type", "donor"], "of the model, as far as the cells have them"
    assert written["train_vae"]["start_from"] == {"model": str(folder / "vae")}
    assert written["train_flow"]["start_from"] == {"model": str(folder / "flow")}
    assert job.train_vae.model == model.vae.vae.config, "sizes are those of the model"
    assert job.train_flow.model.d_model == model.flow.dit.config.d_model
    assert (job.train_vae.train.max_steps, job.seed) == (5, 4)
    assert job.train_flow.start_from.parents == {"cell_type": {"new": "T"}}
    assert load_job(path, overrides) == job, "the command line runs the same job"


def test_a_vae_can_be_kept_and_adapters_trained(folder, ran, tmp_path):
    model = load(folder)
    model.finetune(new_cells(), "cell_type", name="kept", output=tmp_path, keep_vae=True, lora=4)
    [(job, path, _)] = ran
    assert yaml.safe_load(path.read_text())["train_vae"] == {"model": str(folder / "vae"), "train": False}
    assert job.train_vae.pretrained == str(folder / "vae")
    assert job.train_flow.start_from.lora.rank == 4
    assert list(job.ingest.labels) == ["cell_type"]


def test_a_vae_alone_gets_a_new_flow_and_the_name_of_its_folder(folder, ran, tmp_path):
    model = load(folder / "vae")
    model.finetune(new_cells(), output=tmp_path, freeze=["encoder"])
    [(job, path, _)] = ran
    assert path.parent.name == "known-tuned"
    assert job.train_vae.start_from.freeze == ["encoder"]
    assert job.train_flow.start_from is None


def test_what_cannot_be_started_from_is_refused_before_anything_is_read(folder, ran, tmp_path):
    with pytest.raises(
        ArgumentError, match=r"(?s)start_from has no rank.*keep_vae must be.*lora must be.*freeze must be"
    ):
        read_start({"model": folder, "rank": 3, "keep_vae": 1, "lora": 0, "freeze": [3]})
    with pytest.raises(ArgumentError, match="freeze says nothing more"):
        load(folder).finetune(new_cells(), output=tmp_path, lora=2, freeze=["encoder"])
    with pytest.raises(CheckpointError, match="weights='ema'"):
        load(folder, weights="raw").finetune(new_cells(), output=tmp_path)
    with pytest.raises(CheckpointError, match="no folder"):
        read_start(tmp_path / "nowhere")
    assert not ran
    assert not list(tmp_path.iterdir())
    assert read_start(None) is None
    load(folder, weights="ema").finetune(new_cells(), output=tmp_path)  # as the message says
    assert len(ran) == 1
