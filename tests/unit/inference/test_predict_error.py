"""How far to believe combinations that no training cell has: the stage, on a small synthetic screen."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models.small_models import random_weights, vae_config
from helpers.stages.screen_case import CONTROL, HELD_OUT, SOURCE, predict_error, screen_inputs
from pydantic import ValidationError

from pipeline.config.job import STAGE_CONFIGS
from pipeline.core.manifest import Manifest
from pipeline.core.progress import ProgressWriter
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.planning.plan import _predict_error
from pipeline.stages.unseen.finished import BETTER, NO_BETTER
from pipeline.stages.unseen.left_out import MOST_CELLS, _points
from pipeline.stages.unseen.predict_error import read_predictions
from pipeline.stages.unseen.screen import read_latents, read_screen
from pipeline.stages.unseen.ways import Predictor
from pipeline.workflow.preflight import check_against_data
from scldm.checkpoints.native import LoadedFlow, load_vae, save_vae
from scldm.errors import InputError
from scldm.flow.config import PathConfig
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.genes.expression import log1p_cp10k
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("screen")
    return root, screen_inputs(root)


@pytest.fixture(scope="module")
def made(place):
    return predict_error(*place)


def facts_of(folder):
    return json.loads((folder / "manifest.json").read_text())["facts"]


def test_every_unmeasured_combination_has_a_row_with_intervals_and_a_verdict(made):
    table = read_predictions(made / "predicted_errors.csv")
    assert table[["cell_type", "treatment"]].to_dict("records") == [HELD_OUT]
    row = table.iloc[0]
    assert -1 <= row["delta_pearson_low"] <= row["delta_pearson"] <= row["delta_pearson_high"] <= 1
    assert 0 < row["energy_over_floor_low"] <= row["energy_over_floor"] <= row["energy_over_floor_high"]
    assert row["free_energy_over_floor"] > 0
    assert row["verdict"] in (BETTER, NO_BETTER)
    assert row["interval"] == "range of the errors"  # 7 measured combinations are too few for 90 %


def test_left_out_combinations_list_all_answers_and_what_was_predicted_without_them(made):
    table = pd.read_csv(made / "left_out.csv")
    ours = table[table["answer"] == "pooled"]
    assert len(ours) == 7  # 4 types x 2 treatments, but the one that is held out
    assert ours["verdict"].isin([BETTER, NO_BETTER]).all()
    assert table.loc[table["answer"] != "pooled", "verdict"].isna().all()
    assert set(table["answer"]) >= {"generated", "shift", "shift in counts", "control", "nearest context"}
    control = table[table["answer"] == "control"]
    assert (control["delta_pearson"].abs() < 1e-6).all()
    assert (ours["energy_over_floor_predicted_low"] <= ours["energy_over_floor_predicted"]).all()
    facts = facts_of(made)
    assert facts["n_left_out"] == 7
    assert not facts["calibrated"]
    assert any("too few for 90 % intervals" in note for note in facts["notes"])


def test_the_page_names_every_combination_and_the_verdict(made):
    page = (made / "predicted_errors.html").read_text()
    assert "B cell" in page
    assert BETTER in page
    assert "(pooled)" in page
    assert "the more frequent one, given to" in page


def test_a_killed_job_goes_on_to_the_same_numbers(place, made, monkeypatch):
    """It stops in the middle of a training; what was committed is kept."""
    root, inputs = place
    steps = []

    def dies(self, step, total, **fields):
        steps.append(step)
        if step == 9:  # of 4 + 3 x 3 steps for each of two seeds: in the middle of the second group
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressWriter, "update", dies)
        with pytest.raises(KeyboardInterrupt):
            predict_error(root, inputs, version="killed")
    results = root / "predict_error" / "killed" / "results"
    before = {f.name: f.stat().st_mtime_ns for f in results.iterdir()}
    assert set(before) == {"seed0-base.safetensors", "seed0-group0.npz"}
    again = predict_error(root, inputs, version="killed")
    assert {n: t for n, t in ((f.name, f.stat().st_mtime_ns) for f in results.iterdir()) if n in before} == before
    for name in ("predicted_errors.csv", "left_out.csv"):
        assert (again / name).read_text() == (made / name).read_text()


def test_the_facts_say_which_cells_are_judged(made):
    facts = facts_of(made)
    assert (facts["method"], facts["answer"]) == ("pooled", "pooled")
    assert "start" not in facts
    assert 0 <= facts["better_than_shift"] <= 1
    assert facts["verdict_by"] in ("nearness", "the more frequent one")


def test_pooled_cells_have_the_mean_that_the_free_answers_and_the_flow_give_together(place, tmp_path):
    _, inputs = place
    data, pair = IngestedDataset.open(inputs["ingest"]), ("B cell", "treatment 2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = VAE(vae_config(genes_seq_len=None), n_genes=data.vocabulary.n_genes)
    vae.start_at(torch.from_numpy(np.asarray(data.anndata("train").X.mean(0)).ravel()).float())
    save_vae(tmp_path / "vae", vae.eval(), data.vocabulary, data.library_sizes, card="at its start")
    cells = read_screen(inputs["ingest"], CONTROL, max_cells=None, seed=0)
    sizes, shape = DiTConfig(d_model=8, n_layers=1, n_heads=2), {"n_latent_tokens": 3, "latent_width": 4}
    dit = random_weights(DiT(sizes, **shape, n_classes=data.vocabulary.n_classes), 1)
    flow = LoadedFlow(dit, PathConfig(), data.vocabulary, data.library_sizes, 3, 4)
    z = read_latents(inputs["encode"], cells.joinids)
    predict = Predictor(load_vae(tmp_path / "vae"), flow, cells, z, "noise", steps=2, most=30, seed=0)
    known = cells.screen.without([pair])
    weights = predict.weights(known)
    assert weights.sum() == pytest.approx(1)
    found = predict(known, pair, weights)
    shift = log1p_cp10k(found.pooled).toarray().mean(0) - found.control
    pooled = found.means["pooled"] - found.means["latents"]  # an untrained flow changes nothing
    assert np.corrcoef(shift, pooled)[0, 1] > 0.8
    other = predict(cells.screen.without([pair, (pair[0], "treatment 1")]), pair, weights)
    assert (other.pooled != found.pooled).nnz == 0  # other treatments of the context say nothing


def test_cells_of_a_flow_can_be_asked_about_and_an_untrained_one_is_no_better_than_the_shift(place):
    root, inputs = place
    folder = predict_error(root, inputs, version="latents", start="latents", combinations=[HELD_OUT], seeds=1)
    table = read_predictions(folder / "predicted_errors.csv")
    assert table["verdict"].tolist() == [NO_BETTER]
    assert "no better than the mean shift: use method: shift" in (folder / "predicted_errors.html").read_text()
    facts = facts_of(folder)
    assert (facts["method"], facts["start"]) == ("flow", "latents")
    assert facts["better_than_shift"] < 0.5
    assert np.isfinite(table["energy_over_floor"]).all()


def test_results_of_a_version_that_made_other_predictions_are_made_again(place, made):
    root, inputs = place
    results = folder_of(root, "older") / "results"
    results.mkdir()
    for file in (made / "results").iterdir():
        if file.suffix == ".npz":
            with np.load(file) as found:
                np.savez(results / file.name, means=found["means"][:, :4], scores=found["scores"][:, 1:])
        else:
            (results / file.name).write_bytes(file.read_bytes())
    again = predict_error(root, inputs, version="older")
    assert (again / "left_out.csv").read_text() == (made / "left_out.csv").read_text()


def folder_of(root, version):
    path = root / "predict_error" / version
    path.mkdir(parents=True)
    return path


def test_a_start_is_of_a_flow_and_jobs_from_before_there_were_methods_keep_their_settings():
    make = STAGE_CONFIGS["predict_error"].model_validate
    assert make({"control": CONTROL}).judged == "pooled"
    assert make({"control": CONTROL, "start": "noise"}).judged == "flow"
    with pytest.raises(ValidationError, match="leave start out, or set method=flow"):
        make({"control": CONTROL, "start": "latents", "method": "shift"})
    for given in ({}, {"method": "pooled"}, {"method": "shift"}, {"method": "flow"}, {"start": "latents"}):
        config = make({"control": CONTROL, **given})
        dumped = config.model_dump()
        assert make(dumped).judged == config.judged
        assert make(dumped).model_dump() == dumped
    old = make({"control": CONTROL, "method": "flow"}).model_dump()
    assert old["start"] == "noise"
    assert "method" not in old


def test_a_table_of_conditions_names_combinations_too(place, tmp_path):
    root, inputs = place
    path = tmp_path / "conditions.csv"
    path.write_text("cell_type,treatment,n_cells\nB cell,treatment 1,500\n")
    folder = predict_error(root, inputs, version="table", conditions=str(path), seeds=1)
    table = read_predictions(folder / "predicted_errors.csv")
    assert table[["cell_type", "treatment"]].to_dict("records") == [HELD_OUT]
    path.write_text("cell_type,treatment,n_cells\nB cell,treatment 1,500\nB cell,,500\n")
    with pytest.raises(InputError, match=r"conditions\.csv, row 2 has no treatment"):
        predict_error(root, inputs, version="table2", conditions=str(path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"control": {"drug": "control"}}, "control.drug: "),
        ({"control": {"treatment": "contrl"}}, "'contrl'.*did you mean 'control'"),
        ({"control": {**CONTROL, "cell_type": "B cell"}}, "control names all labels"),
        (
            {"combinations": [{"treatment": "treatment 1"}]},
            r"combinations\[0\] has no cell_type; give a class for each",
        ),
        ({"combinations": [{**HELD_OUT, "cell_type": "b cell"}]}, r"combinations\[0\].cell_type: .*B cell"),
        ({"combinations": [{**HELD_OUT, "treatment": "control"}]}, "is the control itself"),
        ({"combinations": [{**HELD_OUT, "treatment": "treatment 2"}]}, "was measured: .* training cells"),
        ({"combinations": [HELD_OUT, HELD_OUT]}, "named twice"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_anything_is_trained(place, more, message):
    root, inputs = place
    with pytest.raises(InputError, match=message):
        predict_error(root, inputs, version="refused", **more)
    assert not list((root / "predict_error" / "refused").iterdir())


def test_it_is_refused_as_soon_as_the_data_are_known_with_all_problems_at_once(place, tmp_path):
    _, inputs = place
    model = tmp_path / "train_vae"
    (model / "model").mkdir(parents=True)
    (model / "model" / "config.json").write_text(json.dumps({"config": {"head": "gaussian"}}))
    vae = Manifest("train_vae", "v", str(model), {}, {}, {"model": "model"}, 1.0, 1.0)
    asked = [{**HELD_OUT, "treatment": "treatment 2"}, {**HELD_OUT, "cell_type": "b cell"}]
    config = STAGE_CONFIGS["predict_error"].model_validate({"control": CONTROL, "combinations": asked})
    with pytest.raises(InputError) as error:
        check_against_data({"predict_error": config}, inputs["ingest"], vae)
    for part in (
        "has a gaussian head",
        "combinations[0]: B cell + treatment 2 was measured",
        "combinations[1].cell_type",
    ):
        assert part in str(error.value)
    pooled, flow = (
        STAGE_CONFIGS["perturb"].model_validate(
            {"source": SOURCE, "to": {"treatment": "treatment 1"}, "method": method}
        )
        for method in ("pooled", "flow")
    )
    with pytest.raises(InputError, match=r"the VAE has a gaussian head, .*; set method=flow"):
        check_against_data({"perturb": pooled}, inputs["ingest"], vae)
    check_against_data({"perturb": flow}, inputs["ingest"], vae)


def test_a_plan_says_what_is_judged_and_how_many_combinations_there_are(place):
    _, inputs = place
    config = STAGE_CONFIGS["predict_error"].model_validate({"control": CONTROL})
    check_against_data({"predict_error": config}, inputs["ingest"], inputs["train_vae"])
    line = _predict_error(config, inputs["ingest"])[-1]
    assert line == (
        "predict_error: cells of method: pooled (perturb) are judged; 7 measured combinations are left out, 1 are "
        "predicted"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"to": {"treatment": "treatmnt 1"}}, r"to.treatment: .*treatment 1"),
        ({"to": {"treatment": "treatment 1", "cell_type": "B cell"}}, "to changes all labels of the data"),
    ],
)
@pytest.mark.parametrize("method", ["pooled", "shift"])
def test_perturb_is_refused_as_soon_as_the_data_are_known_too(place, more, message, method):
    _, inputs = place
    config = STAGE_CONFIGS["perturb"].model_validate({"source": SOURCE, "method": method, **more})
    with pytest.raises(InputError, match=message):
        check_against_data({"perturb": config}, inputs["ingest"], inputs["train_vae"])


def test_a_class_without_training_cells_teaches_perturb_nothing(tmp_path):
    types = ["CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell", "classical monocyte", "B cell"]
    held_out = [{"cell_type": types, "treatment": "treatment 1"}]
    split = {"validation": 0.1, "held_out": {"combinations": held_out}}
    inputs = screen_inputs(tmp_path, split=split)
    config = STAGE_CONFIGS["perturb"].model_validate(
        {"source": SOURCE, "method": "pooled", "to": {"treatment": "treatment 1"}}
    )
    with pytest.raises(InputError, match=r"to: treatment 1 has at most 0 training cells in a context.*method=flow"):
        check_against_data({"perturb": config}, inputs["ingest"], inputs["train_vae"])
    flow = config.model_copy(update={"method": "flow"})
    check_against_data({"perturb": flow}, inputs["ingest"], inputs["train_vae"])


def test_a_screen_without_a_second_context_has_nothing_to_leave_out(tmp_path):
    source = {"type": "synthetic", "n_cells": 200, "n_genes": 20, "n_types": 1, "n_treatments": 2, "n_donors": 1}
    inputs = screen_inputs(tmp_path, source=source, split={"validation": 0.1, "test": 0.1})
    with pytest.raises(InputError, match="no measured combination can be left out"):
        predict_error(tmp_path, inputs)


def test_classes_are_named_in_any_way_that_a_label_of_values_allows(tmp_path):
    values = {"treatment": {"type": "set", "separator": " "}}  # "treatment 1" is "1 treatment"
    inputs = screen_inputs(tmp_path, label_values=values)
    named = predict_error(tmp_path, inputs, seeds=1, control={"treatment": "control control"}, combinations=[HELD_OUT])
    every = predict_error(tmp_path, inputs, version="every", seeds=1)
    assert read_predictions(named / "predicted_errors.csv")["treatment"].tolist() == ["1 treatment"]
    assert (named / "predicted_errors.csv").read_text() == (every / "predicted_errors.csv").read_text()
    asked = {**HELD_OUT, "treatment": "treatment 2"}
    with pytest.raises(InputError, match=r"B cell . 2 treatment was measured"):
        predict_error(tmp_path, inputs, version="measured", combinations=[asked])


def test_cells_that_are_scored_are_drawn_from_the_whole_combination():
    log = np.arange(2 * MOST_CELLS, dtype=float)[:, None]
    space = RealSpace(1, np.array([0]), np.zeros(1), np.eye(1), np.ones(1))
    found = _points(space, log, np.random.default_rng(0)).ravel()
    assert len(set(found)) == MOST_CELLS
    assert (found >= MOST_CELLS).mean() == pytest.approx(0.5, abs=0.1)
    assert (_points(space, log[:9], np.random.default_rng(0)) == log[:9]).all()
