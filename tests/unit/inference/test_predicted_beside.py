"""What predict_error says stands beside the cells of a perturb job, in its notes and in its plan."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.stages.cell_stages import here
from helpers.stages.screen_case import SOURCE, context, folder, screen_inputs, write_predictions

import scldm
from pipeline.config.job import STAGE_CONFIGS
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.planning.generation import perturbed_lines
from pipeline.stages.perturb import run
from pipeline.stages.unseen.finished import (
    BETTER_THAN_POOLED,
    NO_BETTER,
    finished_predictions,
    judged_by,
)
from scldm.data.labels.reserved_names import PREDICTED_COLUMNS
from scldm.errors import InputError

CONTROLS = {"where": {"treatment": "control"}}  # of all cell types
GIVEN = {"source": SOURCE, "cells": CONTROLS, "to": {"treatment": "treatment 1"}, "method": "shift", "shard_size": 64}


@pytest.fixture
def place(tmp_path, ingested):
    """A pipeline of its own, with the same ingest."""
    return tmp_path, ingested


@pytest.fixture(scope="module")
def ingested(tmp_path_factory):
    return {"ingest": screen_inputs(tmp_path_factory.mktemp("screen"))["ingest"]}


def shifted(place, version="v", pool=here, **more):
    root, inputs = place
    at = folder(root, "perturb", version)
    config = STAGE_CONFIGS["perturb"].model_validate({**GIVEN, **more})
    facts = run(config, context(at, inputs), pool=pool)
    write_manifest(Manifest("perturb", version, str(at), config.model_dump(mode="json"), {}, facts, 1.0, 1.0))
    return scldm.open_cells(at).to_anndata(), facts


def test_cells_of_a_predicted_combination_carry_its_error_and_others_none(place):
    root, inputs = place
    write_predictions(root, inputs["ingest"])
    cells, facts = shifted(place)
    mine = (cells.obs["cell_type"] == "B cell").to_numpy()
    assert 0 < mine.sum() < len(mine)
    for column, value in zip(PREDICTED_COLUMNS, (0.4, 0.2, 0.6), strict=True):
        np.testing.assert_allclose(cells.obs[column][mine], value, rtol=1e-6)
        assert cells.obs[column][~mine].isna().all()
    (note,) = [n for n in facts["notes"] if "predicted correlation" in n]
    assert note.startswith("B cell")
    assert "treatment 1: predicted correlation of shifts 0.40 [0.20, 0.60]; no better than pooled cells" in note
    assert cells.uns["scldm"]["predict_error"] == "v"
    config = STAGE_CONFIGS["perturb"].model_validate(GIVEN)
    (line,) = perturbed_lines(config, inputs, root)
    assert "0 of 1 unmeasured combinations are predicted to be better than pooled cells" in line
    assert "(B cell + treatment 1) perturb has method: pooled" in line
    other = STAGE_CONFIGS["perturb"].model_validate({**GIVEN, "to": {"treatment": "treatment 2"}})
    assert perturbed_lines(other, inputs, root) == []
    with pytest.raises(
        InputError, match=r"perturb.keep_obs: predicted_delta_pearson: the output has columns of its own"
    ):
        shifted(place, "kept", source=written(root, cells), cells={}, keep_obs=["predicted_delta_pearson"])


def written(root, cells):
    path = root / "cells.h5ad"
    cells.write_h5ad(path)
    return {"type": "h5ad", "path": str(path)}


def test_predictions_of_other_cells_or_of_another_method_are_not_shown(place):
    root, inputs = place
    write_predictions(root, inputs["ingest"], "other data", data="of other cells")
    write_predictions(root, inputs["ingest"], "pooled", method="pooled", verdict=NO_BETTER)
    cells, facts = shifted(place)
    assert not set(PREDICTED_COLUMNS) & set(cells.obs)
    assert "predict_error" not in cells.uns["scldm"]
    assert not any("predicted" in note for note in facts["notes"])


def test_a_job_that_goes_on_gives_all_its_shards_the_same_columns(place):
    root, inputs = place

    def dies(todo, spec, context):
        yield next(here(todo, spec, context))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shifted(place, pool=dies)
    write_predictions(root, inputs["ingest"])  # finished after the first shard
    cells, _ = shifted(place)
    assert not set(PREDICTED_COLUMNS) & set(cells.obs)


def test_the_newest_predictions_of_the_method_are_taken_whatever_finished_after_them(place):
    root, inputs = place
    write_predictions(root, inputs["ingest"], "first", finished_at=1.0)
    write_predictions(root, inputs["ingest"], "second", finished_at=2.0, verdict=BETTER_THAN_POOLED)
    write_predictions(root, inputs["ingest"], "flow", finished_at=3.0, method="flow", start="noise", verdict=NO_BETTER)
    assert finished_predictions(root, inputs["ingest"], method="shift").version == "second"
    assert finished_predictions(root, inputs["ingest"]).version == "flow"
    assert finished_predictions(root, inputs["ingest"], start="latents") is None
    assert finished_predictions(root, inputs["ingest"], method="pooled") is None


@pytest.mark.parametrize(
    ("settings", "judged"),
    [
        ({"method": "pooled"}, ("pooled", "latents")),
        ({"method": "shift"}, ("shift", "latents")),
        ({}, ("flow", "latents")),
        ({"start": "noise"}, ("flow", "noise")),
        ({"counts": "changed"}, None),  # predict_error draws all counts of a flow anew
        ({"method": "pooled", "start": "control"}, None),
        ({"method": "pooled", "model": {"vae": "a", "flow": "b"}}, None),
    ],
)
def test_predictions_are_shown_for_cells_that_are_made_as_they_were_judged(settings, judged):
    config = STAGE_CONFIGS["perturb"].model_validate({"source": SOURCE, "to": {"treatment": "x"}, **settings})
    assert judged_by(config.model_dump()) == judged
