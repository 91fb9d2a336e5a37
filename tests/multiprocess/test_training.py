"""Two real ranks with DeepSpeed and without Ray: kills under torchrun, damaged checkpoints, and the same weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.training.ranks import KILLED, run, train
from helpers.training.small_job import STEPS, ingest_small, spec_of
from safetensors.torch import load_file

from pipeline.core.manifest import Manifest
from pipeline.core.prometheus import gauge_name
from pipeline.training.checkpoints.manifest import newest, verify
from pipeline.training.objectives.vae import seen_seed

pytestmark = pytest.mark.multiprocess
KEEP = {"keep_last": 3}


@pytest.fixture(scope="module")
def ingested(tmp_path_factory) -> Manifest:
    return ingest_small(tmp_path_factory.mktemp("ingest"))


def torchrun(folder: Path, ingested: Manifest) -> subprocess.Popen:
    """Ranks as processes of their own, started as on a machine without Ray."""
    folder.mkdir(exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(spec_of(folder, ingested, **KEEP)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "pipeline.training.worker", str(folder / "spec.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    log = (folder / "log").open("a")
    return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ingested) -> Path:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    process = torchrun(folder, ingested)
    assert process.wait(timeout=300) == 0, (folder / "log").read_text()[-3000:]
    return folder


def test_the_grafana_board_draws_metrics_that_training_writes(whole):
    board = (Path(__file__).resolve().parents[2] / "cluster" / "grafana" / "scldm.json").read_text()
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    progress = json.loads((whole / "progress.json").read_text())["fields"]
    written = {gauge_name(k) for row in rows for k in row}
    written |= {gauge_name(f"progress/{k}") for k in ("step", "total", *progress)}
    drawn = set(re.findall(r"\bray_(scldm_[a-z_]+)", board))
    assert drawn - written == {"scldm_perf_mfu"}, "it needs a device whose peak is known"


def losses_by_step(folder: Path) -> dict[str, float]:
    """Training and validation losses by "key at step"."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {f"{k} at {r['step']}": r[k] for r in rows for k in ("train/loss", "val/loss") if k in r}


def assert_same_model(a: Path, b: Path) -> None:
    one, two = load_file(a / "model" / "model.safetensors"), load_file(b / "model" / "model.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0, msg=name)


def test_training_lowers_the_loss_and_commits_checkpoints_that_verify(whole):
    folders = sorted((whole / "checkpoints").glob("step-*"))
    assert [int(p.name.split("-")[1]) for p in folders] == [4, 8, 12]
    assert all(verify(p) is None for p in folders)
    losses = losses_by_step(whole)
    assert losses["val/loss at 12"] < losses["val/loss at 6"]
    assert {p.name for p in (whole / "model").iterdir()} == {
        "model.safetensors", "config.json", "vocabulary.json", "library_size.json", "README.md",
    }  # fmt: skip


@pytest.mark.row("T8")
def test_a_killed_run_resumes_and_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, whole, ingested):
    process = torchrun(tmp_path / "run", ingested)
    deadline = time.monotonic() + 240
    checkpoints = tmp_path / "run" / "checkpoints"
    while not list(checkpoints.glob("step-*4-*/MANIFEST.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found, _ = newest(checkpoints)
    assert found is not None
    assert found.position.step < STEPS, "the run was over before it was killed"
    train(spec_of(tmp_path / "run", ingested, **KEEP))
    assert_same_model(tmp_path / "run", whole)


@pytest.mark.row("C2")
def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_it_used(tmp_path, whole, ingested):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    shard = next(last.glob("state-00001-*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    found, rejected = newest(folder / "checkpoints")
    assert found.position.step == 8
    assert "another sha256" in rejected[0]
    train(spec_of(folder, ingested, **KEEP))
    assert "passed over" in (folder / "log").read_text()
    assert_same_model(folder, whole)


@pytest.mark.parametrize("stage", [0, 3])
def test_zero_stages_give_the_same_losses(tmp_path, whole, ingested, stage):
    """Not the same weights: the head's bias, say, has no gradient but rounding, which Adam makes large."""
    train(spec_of(tmp_path / "run", ingested, zero_stage=stage))
    own, expected = losses_by_step(tmp_path / "run"), losses_by_step(whole)
    assert own.keys() == expected.keys()
    assert list(own.values()) == pytest.approx(list(expected.values()), rel=1e-5)


def test_genes_seen_are_drawn_in_training_and_recorded(tmp_path, ingested):
    train(spec_of(tmp_path, ingested, genes_seen={"mode": "weighted", "n": 30}))
    facts = json.loads(next(x for x in (tmp_path / "log").read_text().splitlines() if x.startswith('{"model"')))
    assert facts["steps"] == STEPS
    drawn = {"mode": "weighted", "n": 30, "share": None}
    assert facts["genes_seen"] == {**drawn, "job_seed": 0, "epoch_0_seed": seen_seed(0, 0)}


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_training_from_weights_goes_on_where_they_were(whole, ingested, tmp_path, zero_stage):
    """One tiny step: the weights that come out are those that went in, and the loss is the trained one."""
    spec = spec_of(tmp_path, ingested, max_steps=1, validate_every=1, theta_cells=0, zero_stage=zero_stage,
                   optimizer={"lr": 1e-9})  # fmt: skip
    spec["start_from"] = str(whole / "model")
    spec["config"]["start_from"] = {"model": str(whole / "model")}
    train(spec)
    before, after = (load_file(f / "model" / "model.safetensors") for f in (whole, tmp_path))
    for name in before.keys() - {"log_theta"}:  # theta was fitted after training
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6, msg=name)
    scratch, started = losses_by_step(whole), losses_by_step(tmp_path)
    assert started["val/loss at 1"] < scratch["val/loss at 6"]


def test_a_frozen_part_stays_as_it_was_and_the_rest_is_trained(whole, ingested, tmp_path):
    spec = spec_of(tmp_path, ingested, max_steps=2, zero_stage=2)
    spec["start_from"] = str(whole / "model")
    spec["config"]["start_from"] = {"model": str(whole / "model"), "freeze": ["encoder", "gene_embedding"]}
    train(spec)
    before, after = (load_file(f / "model" / "model.safetensors") for f in (whole, tmp_path))
    for name in before:
        frozen = name.startswith("encoder.") or name == "gene_embedding"
        assert torch.equal(before[name], after[name]) == frozen, name


def test_adapters_are_merged_into_the_model_that_training_leaves(whole, ingested, tmp_path):
    spec = spec_of(tmp_path, ingested, max_steps=3, zero_stage=1, theta_cells=0)
    spec["start_from"] = str(whole / "model")
    spec["config"]["start_from"] = {"model": str(whole / "model"), "lora": {"rank": 2}}
    train(spec)
    before, after = (load_file(f / "model" / "model.safetensors") for f in (whole, tmp_path))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("qkv" in name for name in changed)
    assert not changed & {"gene_embedding", "encoder.to_latent.weight"}
    for name in (n for n in changed if n.endswith("qkv.weight")):
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-6) <= 2


def test_a_killed_training_on_old_and_new_cells_resumes_with_the_same_cells_and_rates(whole, tmp_path):
    old = {"type": "synthetic", "n_cells": 300, "n_genes": 60, "n_types": 5, "seed": 1}
    (tmp_path / "ingest").mkdir()
    mixed = ingest_small(tmp_path / "ingest", replay={"source": old, "share": 0.4})
    start = {"model": str(whole / "model"), "old_learning_rate": 0.1}

    def spec(name: str) -> dict:
        found = spec_of(tmp_path / name, mixed, **KEEP)
        found["start_from"], found["config"]["start_from"] = start["model"], start
        return found

    train(spec("straight"))
    assert run(spec("killed"), fault="training.before_step:step=6:rank=1:kill")[1] == KILLED
    assert newest(tmp_path / "killed" / "checkpoints")[0].position.step < STEPS
    train(spec("killed"))
    assert_same_model(tmp_path / "killed", tmp_path / "straight")
    before, after = (load_file(f / "model" / "model.safetensors") for f in (whole, tmp_path / "straight"))
    assert not torch.equal(before["gene_embedding"], after["gene_embedding"])
