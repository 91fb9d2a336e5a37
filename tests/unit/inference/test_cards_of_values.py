"""The model card and a registered model say what labels are whose classes are values, and take such values."""

from __future__ import annotations

import warnings

import pandas as pd
import pytest
import yaml
from helpers.models.label_values import number, sets, vectors
from helpers.models.small_models import CELL_TYPES, write_flow, write_vae

from pipeline.tracking.mlflow_runs.register import register, save
from scldm.api.folders import ModelFolders
from scldm.api.hub.model_card import model_card
from scldm.api.model import Model, load
from scldm.errors import InputError
from scldm.flow.config import ControlStart

LABELS = (CELL_TYPES, number(unit="uM", scale="log"), sets(), vectors(zero=["ctrl"]))
SUMMARIES = {
    "dose": "a number in uM, logarithmic scale, 1 to 10 (3 values)",
    "drugs": "a set of 3 members joined by '+' (A, B, C)",
    "gene": "a name with a vector: 6 names, 3 with training cells; untreated: ctrl",
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return ModelFolders(write_vae(root / "vae", *LABELS), write_flow(root / "flow", *LABELS))


def test_the_card_says_unit_range_members_and_names(folders):
    card = model_card(load(folders.vae, flow=folders.flow), "mine")
    assert "* label `cell_type`: T, B, NK" in card
    for label, summary in SUMMARIES.items():
        assert f"* label `{label}`: {summary}" in card


def test_a_published_folder_asks_for_vectors_as_the_model_does(folders, tmp_path):
    model = load(folders.vae, flow=folders.flow)
    again = Model.from_pretrained(model.save_pretrained(tmp_path / "mine"))
    one, other = (m.generate({"gene": "E", "dose": 2}, n=3, seed=1) for m in (model, again))
    assert (one.X != other.X).nnz == 0


def test_a_registered_model_says_what_labels_are_and_takes_their_values(folders, tmp_path):
    import mlflow

    save(folders, tmp_path / "model")
    assert yaml.safe_load((tmp_path / "model" / "MLmodel").read_text())["metadata"]["scldm.label_values"] == SUMMARIES
    table = pd.DataFrame({"dose": [2.5], "drugs": ["C+A"], "gene": ["D"], "n_cells": [4]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(table, params={"seed": 2})
        own = load(folders.vae, flow=folders.flow).generate(table, seed=2)
    assert (made.to_numpy() == own.X.toarray()).all()


def test_a_flow_that_was_trained_from_controls_alone_is_not_registered(tmp_path):
    start = ControlStart(label="cell_type", control="T", share=1.0)
    write_vae(tmp_path / "pair" / "vae", CELL_TYPES)
    write_flow(tmp_path / "pair" / "flow", CELL_TYPES, start=start)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(InputError, match=r"not registered: .*from noise.* or train with a share below 1"):
        register(tmp_path / "pair", uri=uri)
    assert not (tmp_path / "mlflow.db").exists()
