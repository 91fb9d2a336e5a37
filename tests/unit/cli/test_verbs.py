"""Verbs: cells of a trained model in one file, equal to those of the notebook's methods, and a report in a browser."""

from __future__ import annotations

import os
import shlex
import webbrowser
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
import torch
from helpers.models.label_values import number
from helpers.models.small_models import CELL_TYPES, DONORS, write_flow, write_vae
from helpers.stages.cell_stages import real_cells, write_cells
from typer.testing import CliRunner

import scldm
from pipeline.cli.app import app
from pipeline.cli.verbs import embed as embed_module
from pipeline.cli.verbs import generate as generate_module
from pipeline.cli.verbs import perturb as perturb_module
from pipeline.cli.verbs import show_report
from pipeline.cli.verbs.options import as_options
from pipeline.config.io.loader import load_job
from pipeline.core.manifest import Manifest, read_manifest, write_manifest
from pipeline.workflow.preflight import check_settings
from pipeline.workflow.runner import JobResult
from scldm.data.vocabulary import LabelVocabulary

ROOT = Path(__file__).resolve().parents[3]
BATCHES = LabelVocabulary("batch", ("b1", "d1"))  # d1 is a donor too


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    for name, labels in (("pair", (CELL_TYPES, DONORS)), ("batches", (CELL_TYPES, DONORS, BATCHES))):
        write_vae(root / name / "vae", *labels)
        write_flow(root / name / "flow", *labels)
    return root


@pytest.fixture
def pair(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(models / "pair")


@pytest.fixture
def cells(tmp_path):
    return write_cells(tmp_path / "cells.h5ad", real_cells())


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def done(*words):
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result


def refused(*words):
    """The problems of a command, a line each; nothing is written."""
    before = sorted(os.listdir())
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert sorted(os.listdir()) == before
    return result.stderr.splitlines()


def same(a, b):
    assert (a.X != b.X).nnz == 0
    assert a.obs_names.tolist() == b.obs_names.tolist()
    assert a.var_names.tolist() == b.var_names.tolist()
    np.testing.assert_array_equal(a.obsm["X_scldm"], b.obsm["X_scldm"])


# ---- generate ------------------------------------------------------------------------------------------------------
def test_generated_cells_are_those_of_the_notebook_with_their_provenance(pair):
    result = done("generate", pair, "--label", "B", "-n", 7, "--seed", 3, "--guidance", 2, "-o", "made/cells.h5ad")
    assert result.stdout == "wrote made/cells.h5ad: 7 cells x 6 genes\n"
    made = anndata.read_h5ad("made/cells.h5ad")
    ours = scldm.load(pair).generate({"cell_type": "B"}, n=7, seed=3, guidance=2.0)
    same(made, ours)
    assert {k: str(v) for k, v in made.uns["scldm"].items()} == {k: str(v) for k, v in ours.uns["scldm"].items()}


def test_classes_of_one_label_follow_one_another_and_labels_are_combined(pair):
    words = (
        "--label",
        "B",
        "--label",
        "cell_type=NK",
        "--label",
        "d_2",
        "--guidance",
        "*=1",
        "--guidance",
        "donor=1.5",
    )
    done("generate", pair, *words, "-n", 3)
    made = anndata.read_h5ad("generated.h5ad")
    assert list(zip(made.obs["cell_type"], made.obs["donor"], strict=True)) == [("B", "d_2")] * 3 + [("NK", "d_2")] * 3
    rows = [{"cell_type": "B", "donor": "d_2"}, {"cell_type": "NK", "donor": "d_2"}]
    same(made, scldm.load(pair).generate(rows, n=3, guidance={"*": 1, "donor": 1.5}))


def test_without_a_label_cells_are_unconditional(pair):
    done("generate", pair, "-n", 2)
    same(anndata.read_h5ad("generated.h5ad"), scldm.load(pair).generate(n=2))


def test_all_problems_are_said_at_once_and_nothing_is_written(pair):
    Path("cells.h5ad").write_text("mine")
    words = ("--label", "Bee", "--label", "donr=d1", "--label", "cell_type=M", "--guidance", "batch=2")
    problems = refused("generate", pair, *words, "--guidance", "donor=x", "-o", "cells.h5ad")
    assert [p.split(":")[0] for p in problems] == [
        "cells.h5ad exists already",
        "--label 'Bee'",
        "--label 'donr=d1'",
        "--label 'cell_type=M'",
        "--guidance takes a number or LABEL=NUMBER; got 'donor=x'",
        "--guidance",
        "--guidance names no scale for cell_type; give each label one",
    ]
    assert "did you mean 'B'?" in problems[1]
    assert "did you mean 'donor'?" in problems[2]
    assert Path("cells.h5ad").read_text() == "mine"


def test_guidance_is_one_scale_or_one_for_each_label(pair):
    [problem] = refused("generate", pair, "--guidance", "2", "--guidance", "donor=1")
    assert "not both" in problem


def test_a_model_and_a_device_that_are_not_there_are_said_with_the_rest(pair):
    problems = refused("generate", "runs/none", "-o", "cells.csv")
    assert "must end in .h5ad" in problems[0]
    assert "runs/none is no folder" in problems[1]
    assert "'tpu' cannot be used here" in refused("generate", pair, "--device", "tpu")[0]


def test_a_model_without_a_flow_is_said_with_the_other_problems(models, pair):
    problems = refused("generate", models / "pair" / "vae", "--label", "Bee")
    assert "has a VAE and no flow" in problems[0]
    assert "did you mean 'B'?; labels: cell_type (T, B, NK); donor (d1, d_2)" in problems[1]


def test_a_class_of_two_labels_must_be_named_with_its_label(models, pair):
    [problem] = refused("generate", models / "batches", "--label", "d1", "-n", 2)
    assert "is a class of donor and batch" in problem
    for way, label in zip(problem.partition("write ")[2].split(" or "), ("donor", "batch"), strict=True):
        done("generate", models / "batches", *shlex.split(way), "-n", 2, "--force")
        assert anndata.read_h5ad("generated.h5ad").obs[label].tolist() == ["d1", "d1"]


def test_a_file_is_replaced_only_when_asked_and_only_by_a_whole_one(pair, monkeypatch):
    done("generate", pair, "-n", 2)
    [problem] = refused("generate", pair, "-n", 3)
    assert "give --force to replace it" in problem
    done("generate", pair, "-n", 3, "--force")
    assert anndata.read_h5ad("generated.h5ad").n_obs == 3

    def half(self, path, **_):
        Path(path).write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(anndata.AnnData, "write_h5ad", half)
    assert run("generate", pair, "-n", 4, "--force").exit_code == 1
    assert anndata.read_h5ad("generated.h5ad").n_obs == 3
    assert os.listdir() == ["generated.h5ad"]


def job_of(said):
    """The job that a note names, as `scldm run` reads it."""
    words = shlex.split(said.partition("after a stop: ")[2])
    assert words[:2] == ["scldm", "run"]
    job = load_job(ROOT / words[2], words[3:])
    check_settings(job)
    return job


def test_many_cells_come_with_the_job_that_makes_the_same(pair, monkeypatch):
    monkeypatch.setattr(generate_module, "MANY", 3)
    words = ("--label", "B", "--label", "NK", "-n", 2, "--seed", 5, "--guidance", "2")
    job = job_of(done("generate", pair, *words).stderr)
    assert job.cells == [{"cell_type": "B", "n_cells": 2}, {"cell_type": "NK", "n_cells": 2}]
    assert (job.kind, job.seed, job.sampler.guidance) == ("generate", 5, 2.0)
    done("generate", pair, "-n", 3, "--force")


def test_many_real_cells_come_with_their_job_too(pair, cells, monkeypatch):
    monkeypatch.setattr(embed_module, "MANY", 3)
    monkeypatch.setattr(perturb_module, "MANY", 3)
    job = job_of(done("embed", pair, cells).stderr)
    assert (job.kind, Path(job.source.path), Path(job.model.vae)) == ("embed", cells, Path(pair))
    job = job_of(done("perturb", pair, cells, "--to", "NK", "--start", "noise").stderr)
    assert (job.kind, job.to, job.start) == ("perturb", {"cell_type": "NK"}, "noise")


def test_a_value_that_no_cell_had_is_asked_for_with_its_label_and_comes_with_a_note(models, pair):
    write_vae(models / "doses" / "vae", CELL_TYPES, number(unit="uM"))
    write_flow(models / "doses" / "flow", CELL_TYPES, number(unit="uM"))
    said = done("generate", models / "doses", "--label", "dose=30", "--label", "B", "-n", 2).stderr
    assert said == "note: dose 30 uM is above the largest of the training cells, 10 uM: extrapolated.\n"
    assert anndata.read_h5ad("generated.h5ad").obs["dose"].tolist() == [30.0, 30.0]
    [problem] = refused("generate", models / "doses", "--label", "30", "--force")
    assert "no label of the model has this class" in problem
    done("generate", models / "doses", "--label", "10", "-n", 2, "--force")  # a dose of the data
    assert anndata.read_h5ad("generated.h5ad").obs["dose"].tolist() == [10.0, 10.0]


# ---- embed and perturb ---------------------------------------------------------------------------------------------
def test_embedded_cells_have_the_latents_of_the_notebook_and_the_file_that_is_read_stays(pair, cells):
    before = cells.read_bytes()
    done("embed", pair, cells)
    made, ours = anndata.read_h5ad("cells-embedded.h5ad"), scldm.load(pair).encode(cells)
    same(made, ours)
    assert made.uns["X_scldm"]["vae"] == scldm.load(pair).generate(n=1).uns["scldm"]["vae"]
    assert cells.read_bytes() == before
    for link in (cells, Path("link.h5ad")):
        if link != cells:
            link.symlink_to(cells)
        assert "is the file that is read" in refused("embed", pair, cells, "-o", link, "--force")[0]


def test_cells_that_are_not_there_and_unusable_ones_are_refused(pair, tmp_path):
    problems = refused("embed", "runs/none", "cells.h5ad", "-o", "x.txt")
    assert [p.split(" (")[0] for p in problems[:2]] == ["cells.h5ad does not exist", "--out x.txt must end in .h5ad"]
    (tmp_path / "broken.h5ad").write_text("no HDF5")
    assert "cannot be read as an h5ad file" in refused("embed", pair, "broken.h5ad")[0]


def test_perturbed_cells_are_those_of_the_notebook(pair, cells):
    done("perturb", pair, cells, "--to", "NK", "--to", "donor=", "--seed", 2, "--start", "noise")
    ours = scldm.load(pair).perturb(cells, {"cell_type": "NK", "donor": None}, seed=2, start="noise")
    made = anndata.read_h5ad("cells-perturbed.h5ad")
    same(made, ours)
    assert made.obs["to_cell_type"].unique().tolist() == ["NK"]


def test_cells_are_moved_to_one_class_of_a_label(pair, cells):
    assert refused("perturb", pair, cells, "--to", "NK", "--to", "B") == [
        "--to names 2 classes of cell_type: one at a time"
    ]


def test_advice_names_options_and_leads_on(pair, tmp_path):
    adata = real_cells()
    del adata.obs["donor"]
    write_cells(tmp_path / "cells.h5ad", adata)
    [problem] = refused("perturb", pair, "cells.h5ad", "--to", "NK")
    option = problem.partition("to go without it: ")[2].split()
    assert option == ["--unknown-labels", "none"]
    done("perturb", pair, "cells.h5ad", "--to", "NK", *option)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("take start='latents' or counts='drawn'", "take --start latents or --counts drawn"),
        ("pass max_missing=0.31", "pass --max-missing 0.31"),
        ("set sampler.guidance=2, flow(start=x)", "set sampler.guidance=2, flow(start=x)"),
    ],
)
def test_arguments_of_methods_are_told_as_options(said, told):
    assert as_options(said) == told


# ---- open ----------------------------------------------------------------------------------------------------------
def evaluation(root, version, finished_at, *, page=True, stage="evaluate"):
    folder = root / "demo" / stage / version
    folder.mkdir(parents=True)
    if page:
        (folder / "report.html").write_text("<html></html>")
    facts = {"report": "report.html"} if page else {}
    write_manifest(Manifest(stage, version, str(folder), {}, {}, facts, 1.0, finished_at))
    return folder


@pytest.fixture
def opened(monkeypatch):
    """What a browser was asked to open."""
    found = []
    browser = type("Browser", (), {"open": lambda self, uri: found.append(uri)})()
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(webbrowser, "get", lambda: browser)
    return found


def test_the_newest_report_is_opened(tmp_path, opened):
    evaluation(tmp_path, "b", 1.0)
    newest = evaluation(tmp_path, "a", 2.0) / "report.html"
    evaluation(tmp_path, "c", 3.0, page=False, stage="generate")
    assert done("open", tmp_path / "demo").stdout == f"{newest}\n"
    assert opened == [newest.as_uri()]
    old = tmp_path / "demo" / "evaluate" / "b"
    assert done("open", old).stdout == f"{old / 'report.html'}\n"


def test_a_moved_pipeline_is_opened_where_it_is(tmp_path, opened):
    evaluation(tmp_path / "old", "a", 1.0)
    (tmp_path / "old").rename(tmp_path / "new")
    done("open", tmp_path / "new" / "demo", "--print")
    assert opened == []


def test_without_a_screen_the_path_is_printed(tmp_path, opened, monkeypatch):
    page = evaluation(tmp_path, "a", 1.0) / "report.html"
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(show_report.sys, "platform", "linux")
    result = done("open", tmp_path / "demo")
    assert result.stdout == f"{page}\n"
    assert "no browser is on this machine" in result.stderr
    assert opened == []


def test_a_folder_without_a_report_says_how_to_get_one(tmp_path, opened):
    stage = evaluation(tmp_path, "a", 1.0, page=False, stage="generate")
    result = run("open", tmp_path / "demo")
    assert result.exit_code == 2
    words = shlex.split(result.stderr.partition("real ones. ")[2])
    job = load_job(ROOT / words[2], words[3:])
    assert (Path(job.output), job.name) == (tmp_path, "demo")
    assert f"name the pipeline, {tmp_path / 'demo'}" in run("open", stage).stderr
    assert run("open", tmp_path / "nothing").exit_code == 2


def test_a_run_that_ends_on_a_report_says_how_to_open_it(tmp_path, opened):
    folder = evaluation(tmp_path, "a", 1.0)
    resolved = SimpleNamespace(folder=tmp_path / "demo")
    lines = JobResult([], {"evaluate": read_manifest(folder)}, resolved).lines()
    words = shlex.split(lines[-1])
    assert words[:3] == ["next", "scldm", "open"]
    done(*words[2:])
    assert opened == [(folder / "report.html").as_uri()]


def test_help_has_a_group_for_what_a_trained_model_does():
    said = done("--help").stdout
    group = said.partition("A trained model")[2].partition("╰")[0]
    assert [w for w in ("generate", "embed", "perturb") if w in group] == ["generate", "embed", "perturb"]
