"""Cells say in which precision and on which kind of device they were made, and no stage mixes two."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pytest
import torch
from helpers.stages.generation_case import generate, write_inputs
from helpers.stages.real_cell_jobs import ALL, cells_and_models, made

from pipeline.config.job import EncodeConfig, GenerateConfig, PredictErrorConfig
from pipeline.core.faults import FaultError
from pipeline.inference.actors.numerics import MARK, agree, begin, end
from pipeline.inference.generator import Generator
from scldm.errors import InputError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ROWS = [{"cell_type": "T", "donor": "d1", "n_cells": 40}]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return cells_and_models(tmp_path_factory.mktemp("real"))


@pytest.fixture
def a100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.8")


def mark(folder, precision: str, device: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(json.dumps({"precision": precision, "device": device}))


def first(folder, facts) -> anndata.AnnData:
    return anndata.read_h5ad(folder / facts["shards"][0]["file"])


def near(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether numbers differ, and little; bounds are those of small random flows, whose fields are steep."""
    return not np.array_equal(found, expected) and np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95


# ---- what the cells say -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("wanted", "told"), [(None, "fp32"), ("bf16", "bf16")])
def test_generated_cells_and_their_manifest_say_precision_and_device(inputs, tmp_path, wanted, told):
    facts = generate(tmp_path / "out", inputs, cells=ROWS, **({} if wanted is None else {"precision": wanted}))
    for said in (facts, facts["shards"][0], first(tmp_path / "out", facts).uns["scldm"]):
        assert (said["precision"], said["device"]) == (told, "cpu")


def test_generated_cells_in_bf16_are_near_those_in_fp32(inputs, tmp_path):
    single, half = (
        first(tmp_path / name, generate(tmp_path / name, inputs, cells=ROWS, precision=name))
        for name in ("fp32", "bf16")
    )
    assert near(half.obsm["X_scldm"], single.obsm["X_scldm"])
    assert not set(half.obs_names) & set(single.obs_names)  # other cells, other names
    assert half.X.sum() == pytest.approx(single.X.sum(), rel=0.05)


@pytest.mark.parametrize("stage", ALL)
def test_jobs_on_real_cells_in_bf16_say_so_and_are_near_fp32(place, tmp_path, stage):
    single, half = (made(place, tmp_path, stage, name=name, precision=name) for name in ("fp32", "bf16"))
    for key in single.obsm:
        assert near(half.obsm[key], single.obsm[key])
    for column in {"nll", "flow_log_prob"} & set(single.obs):
        assert near(half.obs[column].to_numpy(), single.obs[column].to_numpy())
    for cells, told in ((single, "fp32"), (half, "bf16")):
        assert (cells.uns["scldm"]["precision"], cells.uns["scldm"]["device"]) == (told, "cpu")


def test_predicted_errors_have_a_precision_and_no_version_changes_without_one():
    config = PredictErrorConfig(control={"cytokine": "PBS"})
    assert "precision" not in config.model_dump()
    assert config.model_copy(update={"precision": "bf16"}).model_dump()["precision"] == "bf16"


def test_cells_that_no_network_made_have_no_precision(tmp_path):
    assert end(tmp_path, [{"shard": 0}]) == {}


def test_a_precision_that_is_left_out_is_in_no_version():
    for config in (EncodeConfig(), GenerateConfig(n_cells=1)):
        assert "precision" not in config.model_dump()
    assert EncodeConfig(precision="fp32").model_dump()["precision"] == "fp32"


# ---- a job that goes on ------------------------------------------------------------------------------------------
def killed(folder, inputs, **about):
    """Generate the first shard of two; `about` replaces what its record says."""

    def dies(todo, spec, context):
        yield Generator(spec).make(todo[0])
        raise FaultError

    with pytest.raises(FaultError):
        generate(folder, inputs, dies, cells=ROWS, shard_size=20)
    path = next((folder / "cells").glob("part-*.json"))
    record = json.loads(path.read_text()) | about
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))


def test_a_job_that_goes_on_keeps_the_precision_that_it_began_with(inputs, tmp_path):
    killed(tmp_path / "out", inputs, precision="bf16")  # as if the default had been another
    facts = generate(tmp_path / "out", inputs, cells=ROWS, shard_size=20)
    assert [s["precision"] for s in facts["shards"]] == ["bf16", "bf16"]
    assert facts["precision"] == "bf16"
    assert not (tmp_path / "out" / "cells" / MARK).exists()


def test_shards_that_were_begun_on_gpus_are_not_finished_on_cpus(inputs, tmp_path):
    killed(tmp_path / "out", inputs, precision="bf16", device="cuda")
    with pytest.raises(InputError, match=r"begun on GPUs \(bf16\).*run the job where it began, or delete that folder"):
        generate(tmp_path / "out", inputs, cells=ROWS, shard_size=20)


def test_shards_of_two_precisions_never_become_a_stage(inputs, tmp_path):
    def two(todo, spec, context):
        record = Generator(spec).make(todo[0])
        yield record
        yield record | {"shard": 1, "precision": "bf16"}  # of an actor that an earlier driver left

    with pytest.raises(RuntimeError, match="bf16 on cpu and fp32 on cpu"):
        generate(tmp_path / "out", inputs, two, cells=ROWS, shard_size=20)


def test_shards_of_a_version_without_precision_are_finished_in_fp32(inputs, tmp_path):
    killed(tmp_path / "out", inputs, precision=None, device=None)
    facts = generate(tmp_path / "out", inputs, cells=ROWS, shard_size=20)
    assert (facts["precision"], facts["device"]) == ("fp32", "cpu")
    assert "precision" not in facts["shards"][0]


def test_what_was_decided_before_any_shard_is_forgotten(tmp_path):
    mark(tmp_path, "bf16", "cuda")
    begin(tmp_path, [], gpus=0)
    assert agree(tmp_path, None, CPU, where="precision").precision == "fp32"


# ---- actors of one job -------------------------------------------------------------------------------------------
def test_the_first_actor_decides_for_the_others(tmp_path, a100):
    mark(tmp_path, "fp32", "cuda")  # by a card without bf16
    assert agree(tmp_path, None, GPU, where="precision").precision == "fp32"
    (tmp_path / MARK).unlink()
    assert agree(tmp_path, None, GPU, where="precision").as_plain() == {"precision": "bf16", "device": "cuda"}
    with pytest.raises(InputError, match="begun on GPUs"):
        agree(tmp_path, None, CPU, where="precision")


def test_an_actor_whose_card_lacks_the_precision_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    mark(tmp_path, "bf16", "cuda")
    with pytest.raises(InputError, match=r"begun in bf16, which this device lacks .*V100"):
        agree(tmp_path, None, GPU, where="precision")


def test_a_job_without_gpus_does_not_go_on_with_shards_of_gpus(tmp_path):
    records = [{"precision": "bf16", "device": "cuda"}]
    with pytest.raises(InputError, match=r"or set resources.gpus_per_worker=1"):
        begin(tmp_path, records, gpus=0)
    begin(tmp_path, records, gpus=1)


def test_a_damaged_decision_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    (tmp_path / MARK).write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        agree(tmp_path, None, CPU, where="precision")


def test_another_precision_than_that_of_the_shards_is_refused(tmp_path):
    mark(tmp_path, "fp32", "cpu")
    with pytest.raises(InputError, match=r"precision \(bf16\): shards in .* were begun in fp32"):
        agree(tmp_path, "bf16", CPU, where="precision")
