"""A training without Ray: workers are child processes, and go on from their checkpoint when one dies."""

from __future__ import annotations

import logging

import pytest
from helpers.training.ranks import train
from helpers.training.small_job import STEPS, ingest_small, spec_of
from safetensors.torch import load_file

from pipeline.cluster.child import WORKER_LOG
from pipeline.config.job import ResourcesConfig
from pipeline.training.checkpoints.manifest import newest_step
from pipeline.training.tasks.spec import VaeWorkerSpec
from pipeline.training.trainer import fit

pytestmark = pytest.mark.multiprocess
ALONE = ResourcesConfig(ray=False, workers=2)


@pytest.fixture(scope="module")
def ingested(tmp_path_factory):
    return ingest_small(tmp_path_factory.mktemp("ingest"))


def trained(folder, ingested, fault="", **settings):
    folder.mkdir()
    spec = VaeWorkerSpec.model_validate({**spec_of(folder, ingested, **settings), "fault": fault})
    return fit(spec, spec.config.train, ALONE, "train_vae")


def test_a_killed_worker_starts_again_and_ends_as_one_that_nobody_killed(tmp_path, ingested, caplog, monkeypatch):
    (tmp_path / "whole").mkdir()
    train(spec_of(tmp_path / "whole", ingested), world_size=2)
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    facts = trained(tmp_path / "killed", ingested, fault="training.after_checkpoint:rank=1:step=3:kill")
    assert facts["steps"] == STEPS
    assert "failed 1 times" in caplog.text
    one, two = (load_file(tmp_path / x / "model" / "model.safetensors") for x in ("whole", "killed"))
    assert one.keys() == two.keys()
    assert all((one[name] == two[name]).all() for name in one)


def test_a_worker_that_dies_every_time_is_an_error_and_leaves_its_checkpoint(tmp_path, ingested):
    with pytest.raises(Exception, match="SIGKILL"):
        trained(tmp_path / "run", ingested, fault="training.before_step:rank=1:step=6:kill", max_failures=1)
    assert newest_step(tmp_path / "run") == 4
    assert (tmp_path / "run" / WORKER_LOG).is_file()
