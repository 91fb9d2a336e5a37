"""What predict_error says stands beside generated cells, in the plan, and nowhere if it does not cover them."""

from __future__ import annotations

import csv

import anndata
import numpy as np
import pytest
from helpers.stages.generation_case import generate, local_pool, write_inputs

from pipeline.config.job import GenerateConfig
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.inference.request import read_request
from pipeline.planning.generation import predicted_lines
from pipeline.stages.unseen.finished import BETTER, NO_BETTER
from scldm.data.labels.reserved_names import PREDICTED_COLUMNS
from scldm.data.vocabulary import Vocabulary
from scldm.flow.config import ControlStart

ASKED = [
    {"cell_type": "T", "donor": "d1", "n_cells": 10},  # was measured
    {"cell_type": "NK", "donor": "d1", "n_cells": 10},
    {"cell_type": "B", "donor": "d_2", "n_cells": 10},
    {"cell_type": "B", "n_cells": 5},  # no combination
]
PREDICTED = {("NK", "d1"): (0.8, BETTER), ("B", "d_2"): (0.3, NO_BETTER)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("models"))


def predictions(root, rows=PREDICTED, **facts):
    """A finished predict_error of the pipeline `root`."""
    folder = root / "predict_error" / "v"
    folder.mkdir(parents=True)
    names = ("cell_type", "donor", "delta_pearson", "delta_pearson_low", "delta_pearson_high", "verdict")
    with (folder / "predicted_errors.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([names, *[[*k, r, r - 0.1, r + 0.1, verdict] for k, (r, verdict) in rows.items()]])
    facts = {"predicted": "predicted_errors.csv", "report": "predicted_errors.html", "start": "noise", "data": "abc",
             "labels": ["cell_type", "donor"], "control": {"donor": "d0"}, **facts}  # fmt: skip
    write_manifest(Manifest("predict_error", "v", str(folder), {}, {}, facts, 1.0, 1.0))


def obs_of(root, inputs, **more):
    folder = root / "generate" / "v"
    facts = generate(folder, inputs, cells=ASKED, shard_size=12, **more)
    cells = anndata.concat([anndata.read_h5ad(folder / s["file"]) for s in facts["shards"]], merge="same")
    return cells.obs, facts


def test_cells_of_unmeasured_combinations_carry_what_is_predicted_of_them(inputs, tmp_path):
    predictions(tmp_path)
    obs, facts = obs_of(tmp_path, inputs)
    low = obs["predicted_delta_pearson_low"].to_numpy()
    assert np.isnan(low[:10]).all()
    assert np.isnan(low[30:]).all()
    np.testing.assert_allclose(obs["predicted_delta_pearson"][10:30], np.repeat([0.8, 0.3], 10), rtol=1e-6)
    np.testing.assert_allclose(obs["predicted_delta_pearson_high"][10:30], np.repeat([0.9, 0.4], 10), rtol=1e-6)
    assert any("B + d_2: predicted correlation of shifts 0.30 [0.20, 0.40]; no better" in n for n in facts["notes"])


@pytest.mark.parametrize(
    "facts", [{"data": "of other cells"}, {"start": "latents"}, {"rows": {("NK", "d1"): (0.8, BETTER)}}]
)
def test_predictions_of_other_cells_or_not_of_all_combinations_are_not_shown(inputs, tmp_path, facts):
    predictions(tmp_path, **facts)
    obs, _ = obs_of(tmp_path, inputs)
    assert not set(PREDICTED_COLUMNS) & set(obs)


def test_a_job_that_goes_on_gives_all_its_shards_the_same_columns(inputs, tmp_path):
    def dies(todo, spec, context):
        yield next(local_pool(todo, spec, context))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        obs_of(tmp_path, inputs, pool=dies)
    predictions(tmp_path)  # finished after the first shard
    obs, _ = obs_of(tmp_path, inputs)
    assert len(obs) == 35
    assert not set(PREDICTED_COLUMNS) & set(obs)


def test_a_plan_has_one_line_with_the_verdicts(inputs, tmp_path):
    vocabulary = Vocabulary.load(inputs["ingest"].path("vocabulary"))
    request = read_request(GenerateConfig(cells=ASKED), vocabulary, {})
    assert predicted_lines(tmp_path, inputs["ingest"], request) == []
    predictions(tmp_path)
    (line,) = predicted_lines(tmp_path, inputs["ingest"], request)
    assert "1 of 2 unmeasured combinations are predicted to be better than the mean shift" in line
    assert "(B + d_2) perturb has method: shift" in line


def test_cells_by_way_of_control_cells_do_not_carry_what_is_predicted_of_cells_from_noise(tmp_path):
    inputs = write_inputs(tmp_path / "models", start=ControlStart(label="donor", control="d1", share=0.5))
    predictions(tmp_path)
    obs, facts = obs_of(tmp_path, inputs, start="control")
    assert not set(PREDICTED_COLUMNS) & set(obs)
    assert not any("predicted correlation" in note for note in facts["notes"])
