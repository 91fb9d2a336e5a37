"""What is wrong with a job is said before anything of it runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config.context import StageContext
from pipeline.config.io.loader import load_job
from pipeline.config.job import EvaluateConfig, GenerateConfig, IngestConfig
from pipeline.core.manifest import Manifest
from pipeline.stages import ingest
from pipeline.workflow.preflight import check_against_data, check_settings
from scldm.errors import InputError

JOBS = Path(__file__).resolve().parents[3] / "jobs"


@pytest.fixture(scope="module")
def ingested(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("ingest")
    config = IngestConfig.model_validate(
        {"source": {"type": "synthetic", "n_cells": 200, "n_genes": 40, "n_types": 3}, "split": {"test": 0}}
    )
    facts = ingest.run(config, StageContext(folder, {}, 0, SimpleNamespace(), None))
    return Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0)


def test_lanes_workers_and_batch_must_fit_and_all_that_do_not_is_said_at_once():
    job = load_job(JOBS / "demo.yaml", ["train_vae.train.feed.lanes=3", "generate={like: train, per_label: {a: 1}}"])
    with pytest.raises(InputError) as error:
        check_settings(job)
    message = str(error.value)
    assert "train_vae.train.feed.lanes (3) must be a multiple of resources.workers (2)" in message
    assert "set train_vae.train.feed.batch_size=66" in message
    assert "generate takes one of" in message


def test_triton_without_a_gpu_and_options_that_are_ours_are_said_before_the_start(tmp_path):
    options = tmp_path / "options.json"
    options.write_text('{"gradient_clipping": 1}')
    job = load_job(JOBS / "demo.yaml", ["train_vae.train.decoder=triton", f"train_flow.train.deepspeed={options}"])
    with pytest.raises(InputError) as error:
        check_settings(job)
    assert "train_vae.train.decoder (triton) needs a GPU in every worker" in str(error.value)
    assert "sets gradient_clipping, which train.optimizer.clip decides" in str(error.value)
    check_settings(load_job(JOBS / "demo.yaml", ["train_vae.train.decoder=triton", "resources.gpus_per_worker=1"]))


def test_a_range_of_workers_must_divide_the_lanes_whatever_it_comes_to():
    job = load_job(JOBS / "demo.yaml", ["resources.workers={min: 1, max: 3}"])
    with pytest.raises(
        InputError,
        match=r"lanes \(4\) must be a multiple of .*every number from 1 to 3\); set train_vae.train.feed.lanes=6",
    ):
        check_settings(job)
    check_settings(load_job(JOBS / "demo.yaml", ["resources.workers={min: 1, max: 2}"]))
    with pytest.raises(InputError, match=r"min \(3\) must not be more than max \(2\)"):
        load_job(JOBS / "demo.yaml", ["resources.workers={min: 3, max: 2}"])


def test_cautious_steps_that_depend_on_the_number_of_workers_are_refused_with_a_range():
    changed = ["resources.workers={min: 1, max: 2}", "train_vae.train.optimizer.cautious=true"]
    with pytest.raises(InputError, match=r"set train_vae\.train\.zero_stage=0"):
        check_settings(load_job(JOBS / "demo.yaml", changed))
    check_settings(load_job(JOBS / "demo.yaml", [*changed, "train_vae.train.zero_stage=0"]))


@pytest.mark.row("D:unknown-category-at-generation")
def test_a_class_that_was_never_measured_is_refused_as_soon_as_the_data_is_known(ingested):
    wanted = GenerateConfig(cells=[{"cell_type": "neuron", "n_cells": 1}])
    with pytest.raises(InputError, match="no class 'neuron'"):
        check_against_data({"generate": wanted}, ingested)
    check_against_data({"generate": GenerateConfig(like="train")}, ingested)


def test_a_split_without_cells_is_said_before_training(ingested):
    with pytest.raises(InputError, match=r"raise ingest\.split\.test"):
        check_against_data({"evaluate": EvaluateConfig(split="test")}, ingested)
