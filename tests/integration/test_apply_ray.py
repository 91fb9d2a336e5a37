"""Jobs on real cells as a user runs them: a job file, Ray's actors, a finished stage."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers.stages.cell_stages import models, write_soma
from typer.testing import CliRunner

import scldm
from pipeline.cli.app import app
from pipeline.config.io.loader import load_job
from pipeline.core.manifest import newest_manifest
from pipeline.workflow.runner import run_job

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    return write_soma(root / "soma"), models(root)


def job(folder, inputs, **more):
    source, folders = inputs
    what = {"kind": "perturb", "name": "cells", "output": str(folder / "runs"), "source": source, "model": folders}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**what, "to": {"cell_type": "NK"}, "flow": {"steps": 3}, "shard_size": 16, **more}))
    return path


def made(folder, inputs, **more):
    folder.mkdir()
    path = job(folder, inputs, **more)
    assert run_job(load_job(path), path).ran == ["perturb"]
    assert run_job(load_job(path), path).ran == []  # it is there, and is not made again
    return scldm.open_cells(newest_manifest(folder / "runs" / "cells", "perturb").folder)


def test_the_number_of_actors_and_what_they_read_at_once_change_nothing(ray_cluster, inputs, tmp_path):
    one = made(tmp_path / "one", inputs, resources={"actors": 1}, batch_size=5)[:]
    two = made(tmp_path / "two", inputs, resources={"actors": 2}, batch_size=500)
    both = two[:]
    pd.testing.assert_frame_equal(one.obs, both.obs)
    assert (one.X != both.X).nnz == 0
    np.testing.assert_array_equal(one.obsm["X_scldm"], both.obsm["X_scldm"])
    result = CliRunner().invoke(app, ["cells", "verify", str(two.folder)])
    assert result.exit_code == 0, result.output


def test_what_is_wrong_in_the_data_ends_with_exit_code_2(ray_cluster, inputs, tmp_path):
    (tmp_path / "bad").mkdir()
    path = job(tmp_path / "bad", inputs, cells={"where": {"donor": "nobody"}})
    result = CliRunner().invoke(app, ["run", str(path)])
    assert result.exit_code == 2
    assert "no value 'nobody'" in result.output


def test_a_class_that_the_model_does_not_know_is_refused_before_ray_is_there(inputs, tmp_path):
    result = CliRunner().invoke(app, ["validate", str(job(tmp_path, inputs, to={"cell_type": "NKK", "tissue": "x"}))])
    assert result.exit_code == 2
    assert "did you mean 'NK'?" in result.output
    assert "to.tissue" in result.output
