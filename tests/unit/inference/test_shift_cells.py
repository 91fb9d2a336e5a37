"""`method: shift` of perturb: the free answer, applied to the user's cells."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.stages.cell_stages import here
from helpers.stages.screen_case import SOURCE, context, folder, screen_inputs
from pydantic import ValidationError

import scldm
from pipeline.config.job import STAGE_CONFIGS, needs
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.stages.perturb import run
from pipeline.stages.unseen.screen import read_screen
from scldm.errors import InputError
from scldm.metrics.perturbation.shift import CountShift

CONTROLS = {"where": {"cell_type": "B cell", "treatment": "control"}}
GIVEN = {"source": SOURCE, "cells": CONTROLS, "to": {"treatment": "treatment 1"}, "method": "shift", "shard_size": 16}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("screen")
    return root, {"ingest": screen_inputs(root)["ingest"]}  # neither a VAE nor a flow is read


def shifted(place, version, **more):
    root, inputs = place
    at = folder(root, "perturb", version)
    config = STAGE_CONFIGS["perturb"].model_validate({**GIVEN, **more})
    facts = run(config, context(at, inputs), pool=here)
    write_manifest(Manifest("perturb", version, str(at), config.model_dump(mode="json"), {}, facts, 1.0, 1.0))
    return scldm.open_cells(at).to_anndata(), facts


@pytest.fixture(scope="module")
def made(place):
    return shifted(place, "v")


def test_cells_have_counts_the_new_class_and_their_own_labels(made):
    cells, facts = made
    assert cells.X.dtype == np.int32
    assert (cells.obs["to_treatment"] == "treatment 1").all()
    assert (cells.obs["cell_type"] == "B cell").all()
    assert cells.obs["is_synthetic"].all()
    (sources,) = facts["learned_from"].values()
    assert "B cell" not in sources
    assert len(sources) == 3


def test_means_are_those_of_the_free_answer(place, made):
    """Many draws of the same cells: the mean counts are those that `CountShift` expects."""
    from scldm.generation.draws.shift_draw import shifted_counts

    _, inputs = place
    known = read_screen(inputs["ingest"], {"treatment": "control"}, max_cells=None, seed=0)
    shift = CountShift.learn(known.screen, "B cell", "treatment 1")
    before = known.screen.cells("B cell", "control")
    draws = [shifted_counts(before, shift.added, shift.kept, np.arange(before.shape[0]), seed=s).toarray()
             for s in range(300)]  # fmt: skip
    expected = shift.expected(before)
    free = np.mean([shift.apply(before, np.random.default_rng(s)).toarray() for s in range(300)], axis=0)
    for found in (np.mean(draws, axis=0), free):
        assert np.abs(found.mean(0) - expected.mean(0)).max() < 0.05 * expected.mean(0).max()


def test_how_cells_are_cut_changes_nothing(place, made):
    cells, _ = made
    other, _ = shifted(place, "cut", shard_size=7, batch_size=5)
    assert (cells.X != other.X).nnz == 0
    assert list(cells.obs_names) == list(other.obs_names)


def test_only_ingest_is_needed():
    assert needs("perturb", STAGE_CONFIGS["perturb"].model_validate(GIVEN)) == ("ingest",)
    flow = STAGE_CONFIGS["perturb"].model_validate({**GIVEN, "method": "flow"})
    assert needs("perturb", flow) == ("train_vae", "train_flow")
    assert "method" not in flow.model_dump()


def test_a_treatment_that_no_other_context_has_is_refused_before_anything_is_made(place, tmp_path):
    split = {"validation": 0.1, "held_out": {"combinations": [
        {"cell_type": t, "treatment": "treatment 1"} for t in
        ("CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell", "classical monocyte")
    ]}}  # fmt: skip
    inputs = screen_inputs(tmp_path, split=split)
    with pytest.raises(InputError, match=r"cells are B cell . control; no other context has 5 training cells of both"):
        shifted((tmp_path, inputs), "refused")
    assert not list((tmp_path / "perturb" / "refused" / "cells").glob("*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"start": "noise"}, "start cannot be set with method: shift"),
        ({"guidance": 2.0, "max_genes": 5}, "guidance, max_genes cannot be set"),
        ({"to": {"treatment": None}}, "to.treatment is null"),
    ],
)
def test_settings_of_models_are_refused(more, message):
    with pytest.raises(ValidationError, match=message):
        STAGE_CONFIGS["perturb"].model_validate({**GIVEN, **more})


def test_a_target_that_changes_every_label_is_refused(place):
    with pytest.raises(InputError, match="to changes all labels"):
        shifted(place, "all", to={"treatment": "treatment 1", "cell_type": "B cell"})


def test_the_new_class_is_written_as_the_data_call_it(tmp_path):
    inputs = screen_inputs(tmp_path, label_values={"treatment": {"type": "set", "separator": " "}})
    cells, _ = shifted((tmp_path, {"ingest": inputs["ingest"]}), "set")
    assert (cells.obs["to_treatment"] == "1 treatment").all()
