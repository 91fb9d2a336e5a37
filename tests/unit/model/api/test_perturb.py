"""Cells under another condition in a notebook, and cells that are made by way of control cells: those of the jobs."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models.small_models import CELL_TYPES, DONORS, write_flow, write_vae
from helpers.stages.cell_stages import real_cells, run_stage, write_cells
from helpers.stages.generation_case import generate, write_inputs

import scldm
from pipeline.config.io.loader import load_job
from pipeline.config.job import GenerateConfig
from pipeline.workflow.preflight import check_settings
from scldm.data.cell_counts import CellsError
from scldm.errors import InputError
from scldm.flow.config import ControlStart, PathConfig, SamplerConfig
from scldm.flow.sampler import sample_latents
from scldm.flow.transport import FromControls, sample_through_controls
from scldm.generation.request_table import RequestError

START = ControlStart(label="donor", control="d1", share=0.5)
ALONE = START.model_copy(update={"share": 1.0})
JOBS = Path(__file__).resolve().parents[4] / "jobs"
REQUEST = [
    {"cell_type": "B", "donor": "d_2", "n_cells": 30, "guidance.*": 1, "guidance.donor": 0.5},
    {"cell_type": "B", "donor": "d1", "n_cells": 10, "guidance": 2},
    {"cell_type": "T", "n_cells": 10},
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # as the actors of the jobs that are compared with


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_vae(root / "vae", CELL_TYPES, DONORS, genes_seq_len=None)
    for name, start in (("flow", START), ("alone", ALONE), ("noise", None)):
        write_flow(root / name, CELL_TYPES, DONORS, start=start)
    return root


@pytest.fixture(scope="module")
def model(folder):
    return scldm.load(folder / "vae", flow=folder / "flow")


def controls():
    cells = real_cells()
    return cells[(cells.obs["donor"] == "d1").to_numpy()].copy()


@pytest.mark.parametrize(
    "settings",
    [
        {"start": "control", "counts": "changed"}, {"start": "control"}, {"start": "latents", "counts": "changed"},
        {"start": "noise", "guidance": {"*": 1.0, "donor": 0.5}},
    ],
)  # fmt: skip
def test_moved_cells_are_those_of_a_perturb_job_to_the_last_bit(model, folder, tmp_path, settings):
    path = write_cells(tmp_path / "cells.h5ad", controls())
    pair = {"vae": str(folder / "vae"), "flow": str(folder / "flow")}
    job = {"source": {"type": "h5ad", "path": str(path)}, "model": pair, "to": {"donor": "d_2"}, **settings}
    theirs = scldm.open_cells(run_stage("perturb", tmp_path / "job", job, seed=3)).to_anndata()
    ours = model.perturb(anndata.read_h5ad(path), {"donor": "d_2"}, seed=3, **settings)
    np.testing.assert_array_equal(ours.X.toarray(), theirs.X.toarray())
    np.testing.assert_array_equal(ours.obsm["X_scldm"], theirs.obsm["X_scldm"])
    for column in ("library_size", "total_counts", "to_donor", "donor"):
        assert ours.obs[column].tolist() == theirs.obs[column].tolist()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"to": {"donor": "d3"}}, r"to\['donor'\]: donor has no class 'd3'"),
        ({"to": {"drug": "x"}}, "no label 'drug'"),
        ({"to": "d_2"}, "to must name labels"),
        ({"start": "controls"}, "start must be"),
        ({"start": "noise", "counts": "changed"}, "take counts='drawn'"),
        ({"start": "control", "to": {"cell_type": "NK"}}, "give it donor alone"),
        ({"guidance": {"cell_type": 1.0, "donor": 2.0}}, "name that of all labels together"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(model, arguments, words):
    with pytest.raises(RequestError, match=words):
        model.perturb(controls(), **{"to": {"donor": "d_2"}, **arguments})


@pytest.mark.parametrize(
    "fix", [{"start": "noise", "counts": "drawn"}, {"start": "latents", "counts": "changed"}, {"to": {"donor": "d_2"}}]
)
def test_what_a_refusal_proposes_works(model, fix):
    assert model.perturb(controls(), **{"to": {"donor": "d_2"}, "start": "control", **fix}).n_obs


def test_cells_that_are_no_controls_or_lack_a_label_are_named(model):
    with pytest.raises(CellsError, match=r"of 70 cells have another: 'd_2' \(\d+ cells"):
        model.perturb(real_cells(), {"donor": "d_2"}, start="control")
    assert model.perturb(real_cells(), {"donor": "d_2"}, start="latents").n_obs == 70
    cells = real_cells()
    del cells.obs["cell_type"]
    with pytest.raises(CellsError, match=r"no column 'cell_type'.*unknown_labels='none'"):
        model.perturb(cells, {"donor": "d_2"})
    assert model.perturb(cells, {"donor": "d_2"}, unknown_labels="none").n_obs == 70
    cells = real_cells()
    cells.obs["donor"] = cells.obs["donor"].where(np.arange(70) > 2)
    with pytest.raises(CellsError, match=r"3 cells have no donor .first: cell-\d+.*unknown_labels='none'"):
        model.perturb(cells, {"donor": "d_2"})
    assert model.perturb(cells, {"donor": "d_2"}, unknown_labels="none").n_obs == 70


# ---- generation by way of control cells ----------------------------------------------------------------------------
def test_cells_by_way_of_controls_are_those_of_a_job_to_the_last_bit(tmp_path):
    inputs = write_inputs(tmp_path, start=START)
    facts = generate(tmp_path / "job", inputs, cells=REQUEST, seed=7, shard_size=20, start="control")
    job = anndata.concat([anndata.read_h5ad(tmp_path / "job" / s["file"]) for s in facts["shards"]], merge="same")
    ours = scldm.load(tmp_path / "train_vae" / "model", flow=tmp_path / "train_flow" / "model")
    cells = ours.generate(REQUEST, seed=7, start="control")
    np.testing.assert_array_equal(cells.X.toarray(), job.X.toarray())
    pd.testing.assert_frame_equal(
        cells.obs.reset_index(drop=True), job.obs.drop(columns="gen_shard").reset_index(drop=True)
    )
    noise = ours.generate(REQUEST, seed=7)
    carried = ~np.isclose(noise.obsm["X_scldm"], cells.obsm["X_scldm"], rtol=1e-3, atol=1e-3).all(1)
    assert carried.tolist() == [True] * 30 + [False] * 20, "control cells, and rows without the label, are from noise"


def test_controls_are_made_without_guidance_and_carried_with_it(model):
    flow = model.flow
    noise = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))
    conditions = {"cell_type": torch.tensor([0, 1, 2, 0, 1, 3]), "donor": torch.tensor([1, 1, 1, 0, 2, 1])}
    scale = {"*": torch.tensor([2.0, 1.0, 0.0, 2.0, 1.0, 2.0]), "donor": torch.tensor([0.5] * 6)}
    config = SamplerConfig(steps=4)
    found = sample_through_controls(
        flow.dit, noise, conditions, config, PathConfig(), label="donor", control=0, scale=scale
    )
    first = {**conditions, "donor": torch.zeros(6).long()}
    plain = sample_latents(flow.dit, noise, first, config, PathConfig(), scale={"*": torch.ones(6)})
    moved = sample_latents(FromControls(flow.dit), plain, conditions, config, PathConfig(), scale=scale)
    alone = sample_latents(flow.dit, noise, conditions, config, PathConfig(), scale=scale)
    carried = [0, 1, 2, 5]
    torch.testing.assert_close(found[carried], moved[carried])
    torch.testing.assert_close(found[[3, 4]], alone[[3, 4]])


@pytest.mark.parametrize(
    ("flow", "start", "words"),
    [
        ("noise", "control", "set start=noise, or train a flow with train_flow.start="),
        ("alone", "noise", "perturb job with start=control"),
        ("alone", "control", "perturb job with start=control"),
    ],
)
def test_a_start_that_the_flow_was_not_trained_from_is_refused(folder, tmp_path, flow, start, words):
    with pytest.raises(RequestError, match=words):
        scldm.load(folder / "vae", flow=folder / flow).generate({"donor": "d_2"}, n=2, start=start)
    inputs = write_inputs(tmp_path, start={"noise": None, "alone": ALONE}[flow])
    with pytest.raises(InputError, match=words):
        generate(tmp_path / "job", inputs, n_cells=2, start=start)
    if flow == "noise":
        generate(tmp_path / "job", inputs, n_cells=2, start="noise")


def test_a_job_that_trains_a_flow_is_refused_before_it_starts(tmp_path):
    alone = "train_flow.start={control: {cell_type: A}, share: 1}"
    for given, words in ((alone, "perturb job with start=control"), ("generate.start=control", "set start=noise")):
        with pytest.raises(InputError, match=words):
            check_settings(load_job(JOBS / "demo.yaml", [given]))


def test_a_generation_from_noise_keeps_the_settings_it_had_before():
    assert "start" not in GenerateConfig(n_cells=1).model_dump()
