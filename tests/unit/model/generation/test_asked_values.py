"""Cells of values that no cell of the data had: from jobs and notebooks alike, with notes, and after saving."""

from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from helpers.models.label_values import number, sets, vectors
from helpers.models.small_models import CELL_TYPES, write_flow, write_vae
from helpers.stages.generation_case import generate, write_inputs

from scldm.api.model import load
from scldm.checkpoints.asked_values import with_values
from scldm.checkpoints.native import load_flow
from scldm.errors import InputError

LABELS = (CELL_TYPES, number(unit="uM"), sets(), vectors(zero=["ctrl"]))
ROWS = [
    {"cell_type": "T", "dose": 2.5, "drugs": "C+A", "gene": "D", "n_cells": 6},
    {"cell_type": "B", "dose": 30, "drugs": "B+A", "gene": "ctrl", "n_cells": 3},
    {"dose": 1, "n_cells": 4},
    {"n_cells": 2},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return load(write_vae(root / "vae", *LABELS), flow=write_flow(root / "flow", *LABELS))


@pytest.fixture(scope="module")
def asked(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(ROWS, seed=3)


def test_cells_have_the_values_that_were_asked_for(asked):
    assert asked.obs["dose"].tolist()[:9] == [2.5] * 6 + [30.0] * 3
    assert asked.obs["drugs"].tolist()[:9] == ["A+C"] * 6 + ["A+B"] * 3
    assert asked.obs["gene"].tolist()[:9] == ["D"] * 6 + ["ctrl"] * 3
    assert asked.obs["dose"].isna().tolist() == [False] * 13 + [True] * 2


def test_cells_of_known_classes_are_the_same_beside_values_that_no_cell_had(model, asked):
    known = [{"cell_type": "T", "dose": 1, "n_cells": 6}, {"n_cells": 3}, *ROWS[2:]]
    plain = model.generate(known, seed=3)
    np.testing.assert_allclose(asked.obsm["X_scldm"][9:], plain.obsm["X_scldm"][9:], rtol=1e-4, atol=1e-5)


def test_a_notebook_warns_of_values_far_from_the_training_cells(model):
    with pytest.warns(UserWarning, match="dose 30 uM is above the largest of the training cells, 10 uM: extrapolated"):
        made = model.generate({"dose": "30"}, n=2)
    assert made.uns["scldm"]["notes"] == ["dose 30 uM is above the largest of the training cells, 10 uM: extrapolated."]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "notes" not in model.generate({"dose": 3}, n=2).uns["scldm"]


def test_a_job_makes_the_cells_of_the_notebook(tmp_path, model, asked):
    inputs = write_inputs(tmp_path / "models", LABELS)
    pd.DataFrame(ROWS).to_csv(tmp_path / "rows.csv", index=False)
    facts = generate(tmp_path / "made", inputs, conditions=str(tmp_path / "rows.csv"), seed=3)
    [shard] = facts["shards"]
    made = anndata.read_h5ad(tmp_path / "made" / shard["file"])
    np.testing.assert_array_equal(made.X.toarray(), asked.X.toarray())
    assert made.obs["dose"].tolist()[:13] == asked.obs["dose"].tolist()[:13]
    assert "dose 2.5 uM has no training cells: interpolated between 1 and 3 uM." in facts["notes"]
    assert any(n.startswith("gene D has no training cells: asked for by its vector alone") for n in facts["notes"])


def test_all_that_cannot_be_asked_for_is_refused_together(tmp_path):
    inputs = write_inputs(tmp_path / "models", LABELS)
    rows = [{"dose": "high", "drugs": "A+Z", "gene": "Q", "n_cells": 1}]
    with pytest.raises(InputError) as error:
        generate(tmp_path / "made", inputs, cells=rows)
    assert len(str(error.value).splitlines()) == 3
    assert not (tmp_path / "made" / "cells").exists()


def test_a_flow_is_saved_and_loaded_with_its_values_and_extended_then(tmp_path):
    write_flow(tmp_path / "flow", *LABELS)
    flow = load_flow(tmp_path / "flow")
    assert {k: v.kind for k, v in flow.vocabulary.values.items()} == {
        "dose": "number",
        "drugs": "set",
        "gene": "vector",
    }
    wide = with_values(flow, [{"gene": "E"}])
    assert wide.vocabulary.label("gene").classes[-1] == "E"
    assert with_values(flow, [{"gene": "A"}, {"cell_type": "T"}]) is flow
