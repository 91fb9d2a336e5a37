"""`method: pooled` of perturb: cells that the flow carries, with a mean that other contexts have a say in."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from helpers.models.small_models import random_weights, vae_config
from helpers.stages.cell_stages import here
from helpers.stages.screen_case import SOURCE, context, folder, screen_inputs, write_predictions
from pydantic import ValidationError

import scldm
from pipeline.config.job import STAGE_CONFIGS, needs
from pipeline.core.manifest import Manifest, read_manifest, write_manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.stages.evaluate import run as evaluate
from pipeline.stages.evaluate import under_new_labels
from pipeline.stages.perturb import run
from pipeline.stages.unseen.finished import NO_BETTER
from pipeline.stages.unseen.pooled import FACTORS
from pipeline.stages.unseen.screen import read_screen
from scldm.checkpoints.native import save_flow, save_vae
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.flow.config import ControlStart, PathConfig
from scldm.metrics.genes.expression import log1p_cp10k
from scldm.metrics.perturbation.free_answers import free_answers
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE

CONTROLS = {"where": {"treatment": "control"}}
TARGET = {"treatment": "treatment 1"}
MANY = {**SOURCE, "n_cells": 4000}  # means of few cells are mostly chance
FEW = {**SOURCE, "n_cells": 30}
GIVEN = {"source": MANY, "cells": CONTROLS, "to": TARGET, "shard_size": 64, "flow": {"steps": 2}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("screen")
    inputs = screen_inputs(root, source=MANY)
    data = IngestedDataset.open(inputs["ingest"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = VAE(vae_config(genes_seq_len=None), n_genes=data.vocabulary.n_genes)
    vae.start_at(torch.from_numpy(np.asarray(data.anndata("train").X.mean(0)).ravel()).float())
    save_vae(inputs["train_vae"].path("model"), vae.eval(), data.vocabulary, data.library_sizes, card="at its start")
    config, shape = DiTConfig(d_model=12, n_layers=1, n_heads=2), {"n_latent_tokens": 3, "latent_width": 4}
    dit = random_weights(DiT(config, **shape, n_classes=data.vocabulary.n_classes), 1)
    save_flow(
        folder(root, "train_flow") / "model", {"model": dit.state_dict(), "raw": dit.state_dict()}, config=config,
        path=PathConfig(), latent_shape=(3, 4), vocabulary=data.vocabulary, library_sizes=data.library_sizes,
        card="untrained",
    )  # fmt: skip
    made = Manifest("train_flow", "v", str(folder(root, "train_flow")), {}, {}, {"model": "model"}, 1.0, 1.0)
    write_manifest(made)
    return root, inputs | {"train_flow": made}


def perturbed(place, version, **more):
    root, inputs = place
    at = folder(root, "perturb", version)
    config = STAGE_CONFIGS["perturb"].model_validate({**GIVEN, **more})
    facts = run(config, context(at, inputs), pool=here)
    write_manifest(Manifest("perturb", version, str(at), config.model_dump(mode="json"), {}, facts, 1.0, 1.0))
    return scldm.open_cells(at).to_anndata(), facts


@pytest.fixture(scope="module")
def pooled(place):
    return perturbed(place, "pooled", method="pooled")


def shift_of(cells, controls):
    return np.asarray(log1p_cp10k(sp.csr_matrix(cells)).mean(0) - log1p_cp10k(sp.csr_matrix(controls)).mean(0)).ravel()


def test_cells_have_the_mean_shift_that_was_pooled(place, pooled):
    cells, _ = pooled
    plain, _ = perturbed(place, "flow", counts="changed")  # untrained models say that nothing changes
    mine = (cells.obs["cell_type"] == "B cell").to_numpy()
    asked = pooled_shift_of(place, "B cell")
    everything, _ = perturbed(place, "own", to={"treatment": "control"}, counts="changed")
    found, unpooled = (shift_of(x.X[mine], everything.X[mine]) for x in (cells, plain))
    assert np.corrcoef(found, asked)[0, 1] > 0.75  # one draw of about 200 cells of 60 counts
    assert np.abs(found - asked).mean() < 0.75 * np.abs(unpooled - asked).mean()


def test_the_shift_is_the_weighted_average_of_all_predictions(place, pooled):
    _, facts = pooled
    (weights,) = facts["weights"].values()
    assert set(weights) == {"shift", "additive NB", "linear", "flow"}
    assert weights["flow"] < 0.3, "models that say that nothing changes have little weight"
    _, inputs = place
    known = read_screen(inputs["ingest"], {"treatment": "control"}, max_cells=None, seed=0).screen
    drawn = [free_answers(known, "B cell", "treatment 1", np.random.default_rng(seed)) for seed in range(5)]
    base = drawn[0]["control"].log.mean(0)
    free = {name: np.mean([x[name].log.mean(0) for x in drawn], axis=0) - base for name in drawn[0]}
    expected = np.sum([weights[name] * free[name] for name in ("shift", "additive NB", "linear")], axis=0)
    assert np.corrcoef(expected, pooled_shift_of(place, "B cell"))[0, 1] > 0.8


def pooled_shift_of(place, cell_type):
    root, inputs = place
    labels = Vocabulary.load(inputs["ingest"].path("vocabulary")).labels
    key = [x.encode([{"cell_type": cell_type, "treatment": "control"}[x.name]])[0] for x in labels]
    with np.load(root / "perturb" / "pooled" / FACTORS) as found:
        (row,) = np.flatnonzero((found["keys"] == key).all(1))
        return found["shift"][row]


def test_cells_have_counts_and_the_facts_name_the_contexts(pooled):
    cells, facts = pooled
    assert cells.X.dtype == np.int32
    assert (cells.obs["to_treatment"] == "treatment 1").all()
    assert facts["method"] == "pooled"
    assert len(facts["learned_from"]) == 4
    assert all("B cell" not in sources for sources in facts["learned_from"].values())


def test_how_cells_are_cut_changes_nothing(place, pooled):
    cells, _ = pooled
    other, _ = perturbed(place, "cut", method="pooled", shard_size=32, batch_size=64)
    assert (cells.X != other.X).nnz == 0


def test_the_training_cells_and_both_models_are_needed():
    needed = needs("perturb", STAGE_CONFIGS["perturb"].model_validate({**GIVEN, "method": "pooled"}))
    assert needed == ("ingest", "train_vae", "train_flow")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"start": "noise"}, "start .noise. uses none of a cell's counts"),
        ({"counts": "drawn"}, "leave counts .drawn. out"),
        ({"unknown_labels": "none"}, "method: pooled needs theirs"),
        ({"to": {"treatment": None}}, "to.treatment is null"),
    ],
)
def test_settings_that_pooling_would_ignore_are_refused(more, message):
    with pytest.raises(ValidationError, match=message):
        STAGE_CONFIGS["perturb"].model_validate({**GIVEN, "method": "pooled", **more})


def test_a_combination_with_too_few_cells_for_a_mean_is_named(place):
    with pytest.raises(InputError, match=r"at least 5 cells of a combination, and some have fewer .*: \d"):
        perturbed(place, "few", method="pooled", source=FEW)
    cells, _ = perturbed(place, "few flow", method="flow", source=FEW)
    assert cells.n_obs


def test_a_model_of_other_classes_than_the_training_cells_is_refused(place, tmp_path):
    _, inputs = place
    vae, flow = (str(inputs[stage].path("model")) for stage in ("train_vae", "train_flow"))
    other = screen_inputs(tmp_path, source={**SOURCE, "n_treatments": 3})
    with pytest.raises(InputError, match="the model was trained on other genes or classes; leave model out"):
        perturbed((tmp_path, other), "other", method="pooled", model={"vae": vae, "flow": flow})
    cells, _ = perturbed((tmp_path, other), "flow", method="flow", model={"vae": vae, "flow": flow})
    assert cells.n_obs


def test_moved_cells_are_scored_as_the_combination_that_they_became(place):
    """evaluate with cells: perturb, on the combination that no training cell has."""
    root, inputs = place
    where = {"where": {"treatment": "control", "cell_type": "B cell"}}
    perturbed(place, "held_out", method="pooled", cells=where)
    moved = read_manifest(root / "perturb" / "held_out")
    config = STAGE_CONFIGS["evaluate"].model_validate(
        {"cells": "perturb", "control": {"treatment": "control"}, "umap": False, "resamples": 5, "refits": 5,
         "n_pcs": 5, "reconstruction_cells": 16}
    )  # fmt: skip
    assert needs("evaluate", config) == ("ingest", "train_vae", "perturb")
    assert "cells" not in STAGE_CONFIGS["evaluate"]().model_dump()
    write_predictions(root, inputs["ingest"], method="pooled", verdict=NO_BETTER)
    at = folder(root, "evaluate")
    facts = evaluate(
        config, context(at, {"ingest": inputs["ingest"], "train_vae": inputs["train_vae"], "perturb": moved})
    )
    table = pd.read_csv(at / "combinations.csv")
    assert set(table["context"]) == {"B cell"}
    assert set(table["treatment"]) == {"treatment 1"}
    assert {"generated", "shift", "floor"} <= set(table["answer"])
    assert facts["report"] == "report.html"
    page = (at / "report.html").read_text()
    assert "predicted correlation of shifts 0.40 [0.20, 0.60]; no better than the mean shift" in page
    assert "Found: " in page


def test_labels_that_perturb_removed_are_missing():
    obs = pd.DataFrame({"cell_type": ["B", "T"], "drug": ["x", "x"], "to_drug": ["y", ""], "to_cell_type": ["T", "T"]})
    found = under_new_labels(obs)
    assert found["cell_type"].tolist() == ["T", "T"]
    assert found["drug"].isna().tolist() == [False, True]
    assert found["drug"][0] == "y"


def test_cells_that_are_no_controls_are_not_carried_from_controls(place):
    root, inputs = place
    data = IngestedDataset.open(inputs["ingest"])
    config, shape = DiTConfig(d_model=12, n_layers=1, n_heads=2), {"n_latent_tokens": 3, "latent_width": 4}
    dit = random_weights(DiT(config, **shape, n_classes=data.vocabulary.n_classes, from_controls=True), 1)
    save_flow(
        folder(root, "train_flow", "transport") / "model", {"model": dit.state_dict(), "raw": dit.state_dict()},
        config=config, path=PathConfig(), latent_shape=(3, 4), vocabulary=data.vocabulary,
        library_sizes=data.library_sizes, card="untrained",
        start=ControlStart(label="treatment", control="control", share=0.5),
    )  # fmt: skip
    at = str(folder(root, "train_flow", "transport"))
    flow = Manifest("train_flow", "transport", at, {}, {}, {"model": "model"}, 1.0, 1.0)
    with pytest.raises(InputError, match=r"carries cells whose treatment is 'control', and .* have another"):
        perturbed((root, inputs | {"train_flow": flow}), "treated", method="pooled", start="control", cells={})
    assert not list((root / "perturb" / "treated").glob("cells/part-*"))
