"""Conditions of `Model.generate` in the forms that people hold them: lists of classes, the obs of real cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers.stages.cell_stages import models

import scldm
from scldm.generation.request_table import RequestError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models(root)
    return scldm.load(root)


@pytest.mark.parametrize("of", [list, tuple, np.array, pd.Series, pd.Index, pd.Categorical])
def test_a_list_of_classes_is_a_row_for_each(model, of):
    cells = model.generate({"cell_type": of(["B", "NK"]), "donor": "d1"}, n=3, seed=1)
    plain = model.generate([{"cell_type": c, "donor": "d1"} for c in ("B", "NK")], n=3, seed=1)
    np.testing.assert_array_equal(cells.X.toarray(), plain.X.toarray())
    assert cells.obs["cell_type"].tolist() == ["B"] * 3 + ["NK"] * 3
    assert set(cells.obs["donor"]) == {"d1"}


def test_lists_of_other_lengths_are_refused_with_both_lengths(model):
    with pytest.raises(RequestError, match="lists of classes must be of one length; got cell_type 2, donor 1"):
        model.generate({"cell_type": ["B", "NK"], "donor": ["d1"]}, n=3)


def test_obs_of_real_cells_is_one_cell_of_each_row(model):
    obs = pd.DataFrame(
        {"cell_type": ["B", "T", "B"], "donor": ["d1", "d_2", None], "n_counts": [5, 6, 7]}, index=["x", "y", "z"]
    )
    cells = model.generate(obs, seed=2)
    assert cells.obs["cell_type"].tolist() == ["B", "T", "B"]
    assert cells.obs["donor"].tolist()[:2] == ["d1", "d_2"]
    levels = model.generate(obs.set_index(["cell_type", "donor"]), seed=2)
    np.testing.assert_array_equal(levels.X.toarray(), cells.X.toarray())


def test_obs_that_lacks_a_label_of_the_model_is_not_guessed_at(model):
    with pytest.raises(RequestError, match=r"how many cells\? .* this one lacks donor"):
        model.generate(pd.DataFrame({"cell_type": ["B"], "doner": ["d1"]}))


def test_a_bare_number_says_what_to_write(model):
    with pytest.raises(RequestError, match=r"conditions is 100; for cells without labels write generate\(n=100\)"):
        model.generate(100)
