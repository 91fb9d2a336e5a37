"""The whole pipeline on one real Ray cluster: SOMA, Ray Data, Ray Train and DeepSpeed, MLflow, AnnData, the report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import anndata
import numpy as np
import pytest
import yaml

from pipeline.config.io.loader import load_job
from pipeline.config.job import STAGES
from pipeline.core.manifest import newest_manifest
from pipeline.workflow.runner import run_job
from scldm.errors import InputError

pytestmark = pytest.mark.integration

JOB = {
    "kind": "pipeline",
    "name": "tiny",
    "resources": {"workers": 2, "cpus_per_worker": 1, "actors": 2},
    "ingest": {
        "source": {"type": "synthetic", "n_cells": 600, "n_genes": 120, "n_types": 3},
        "labels": ["cell_type", "tissue_general"],
    },
    "train_vae": {
        "model": {
            "d_model": 16,
            "n_layers": 1,
            "n_heads": 2,
            "n_heads_cross": 2,
            "n_latent_tokens": 4,
            "latent_width": 4,
        },
        "train": {"max_steps": 60, "validate_every": 30, "checkpoint_every": 30, "optimizer": {"lr": 5e-3}},
    },
    "encode": {},
    "train_flow": {
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2},
        "train": {"max_steps": 60, "validate_every": 30, "checkpoint_every": 30},
    },
    "generate": {"like": "train", "n_cells": 150, "shard_size": 60, "batch_size": 50},
    "evaluate": {"umap": False, "n_pcs": 8, "n_top_genes": 100, "transport_cells": 50, "reconstruction_cells": 40},
}


@pytest.fixture(scope="module")
def line(tmp_path_factory, ray_cluster):
    """The job's file, its pipeline folder, and what ran."""
    root = tmp_path_factory.mktemp("pipeline")
    file = root / "job.yaml"
    file.write_text(yaml.safe_dump({**JOB, "output": str(root / "runs")}))
    return file, root / "runs" / "tiny", run_job(load_job(file), file).ran


def generated(folder: Path) -> list[anndata.AnnData]:
    manifest = newest_manifest(folder, "generate")
    return [anndata.read_h5ad(Path(manifest.folder) / s["file"]) for s in manifest.facts["shards"]]


def test_every_stage_ran_and_left_a_manifest(line):
    _, folder, ran = line
    assert ran == list(STAGES)
    assert all(newest_manifest(folder, stage) for stage in STAGES)


def test_both_trainings_learn(line):
    _, folder, _ = line
    for stage in ("train_vae", "train_flow"):
        path = Path(newest_manifest(folder, stage).folder) / "metrics.jsonl"
        losses = [r["val/loss"] for r in map(json.loads, path.read_text().splitlines()) if "val/loss" in r]
        assert losses[-1] < losses[0]


def test_generated_cells_keep_the_anndata_contract(line):
    _, folder, _ = line
    shards = generated(folder)
    assert [a.n_obs for a in shards] == [60, 60, 30]
    cells = anndata.concat(shards, merge="same", uns_merge="same")
    assert cells.obs_names.is_unique
    assert cells.X.format == "csr"
    assert np.issubdtype(cells.X.dtype, np.integer)
    assert cells.X.min() >= 0
    assert cells.obs["is_synthetic"].all()
    assert sorted(cells.obs["gen_index"]) == list(range(150))
    assert list(shards[0].obs["cell_type"].cat.categories) == list(shards[1].obs["cell_type"].cat.categories)
    assert cells.obsm["X_scldm"].shape == (150, 16)
    assert "feature_name" in cells.var
    assert cells.uns["scldm"]["seed"] == 0
    np.testing.assert_array_equal(np.asarray(cells.X.sum(1)).ravel(), cells.obs["total_counts"])
    assert cells.obs["total_counts"].median() > 0.5 * cells.obs["library_size"].median()


def test_a_second_run_does_nothing(line, capsys):
    file, _, _ = line
    assert run_job(load_job(file), file).ran == []
    assert "nothing to do: all 6 stages are finished" in capsys.readouterr().out


@pytest.mark.row("G3")
def test_generation_does_not_depend_on_shards_batches_or_actors(line):
    """And what a changed setting does not touch is not run again."""
    file, folder, _ = line
    before = anndata.concat(generated(folder), merge="same")
    changed = ["generate.shard_size=150", "generate.batch_size=64", "resources.actors={min: 1, max: 3}"]
    assert run_job(load_job(file, changed), file).ran == ["generate", "evaluate"]
    after = anndata.concat(generated(folder), merge="same")
    assert list(before.obs_names) == list(after.obs_names)
    assert (before.X != after.X).nnz == 0
    np.testing.assert_array_equal(before.obsm["X_scldm"], after.obsm["X_scldm"])


@pytest.mark.row("G6")
def test_a_lost_shard_alone_is_made_again(line):
    file, folder, _ = line
    manifest = newest_manifest(folder, "generate")
    job = load_job(file, ["generate.seed=5"])
    run_job(job, file)
    manifest = newest_manifest(folder, "generate")
    hashes = {s["file"]: s["sha256"] for s in manifest.facts["shards"]}
    stage = Path(manifest.folder)
    (stage / "manifest.json").unlink()
    (stage / "cells" / "part-00001.h5ad").unlink()
    kept = (stage / "cells" / "part-00000.h5ad").stat().st_mtime_ns
    run_job(job, file)
    again = {s["file"]: s["sha256"] for s in newest_manifest(folder, "generate").facts["shards"]}
    assert again == hashes
    assert (stage / "cells" / "part-00000.h5ad").stat().st_mtime_ns == kept
    assert (
        hashlib.sha256((stage / "cells" / "part-00001.h5ad").read_bytes()).hexdigest()
        == hashes["cells/part-00001.h5ad"]
    )


def test_an_unknown_class_is_said_before_anything_runs(line):
    file, _, _ = line
    job = load_job(file, ["generate={cells: [{cell_type: 'B cel', n_cells: 3}]}"])
    with pytest.raises(InputError, match="no class 'B cel'"):
        run_job(job, file)


def test_mlflow_holds_a_parent_run_and_a_child_for_every_stage(line):
    from pipeline.tracking.mlflow_runs.client import mlflow_client

    _, folder, _ = line
    client = mlflow_client(f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("scldm/tiny")
    runs = client.search_runs([experiment.experiment_id])
    by_stage = {r.data.tags["scldm.stage"]: r for r in runs}
    assert set(by_stage) == {"pipeline", *STAGES}
    vae = by_stage["train_vae"]
    assert vae.data.tags["mlflow.parentRunId"] == by_stage["pipeline"].info.run_id
    assert vae.data.params["train.max_steps"] == "60"
    steps = [m.step for m in client.get_metric_history(vae.info.run_id, "train/loss")]
    assert steps == sorted(set(steps))
    assert max(steps) == 60
    assert vae.info.status == "FINISHED"
    assert any(k.startswith("eval/") for k in by_stage["evaluate"].data.metrics)


def test_the_report_is_one_file_with_its_pictures_inside(line):
    _, folder, _ = line
    report = newest_manifest(folder, "evaluate").path("report").read_text()
    assert "data:image/png;base64" in report
    assert "http://" not in report.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_a_gaussian_head_goes_through_the_whole_line(line):
    """Trainings of a few steps: what matters here is that every stage takes what the one before it makes."""
    file, folder, _ = line
    few = [
        f"{stage}.train={{max_steps: 3, validate_every: 3, checkpoint_every: 3}}"
        for stage in ("train_vae", "train_flow")
    ]
    job = load_job(
        file, ["train_vae.model.head=gaussian", "train_flow.train.sample_every=1", *few, "generate.n_cells=60"]
    )
    assert run_job(job, file).ran == list(STAGES[1:])
    cells = anndata.concat(generated(folder), uns_merge="same")
    assert cells.uns["scldm"]["scale"] == "log1p_cp10k"
    assert (cells.X.toarray() < 0).any()
    evaluated = newest_manifest(folder, "evaluate")
    assert {"w2", "reconstruction_mse", "label_accuracy.cell_type"} <= evaluated.facts["metrics"].keys()
    assert {"library_size_ks", "reconstruction_nll"} <= evaluated.facts["left_out"].keys()
    assert not evaluated.facts["left_out"].keys() & evaluated.facts["metrics"].keys()
    assert "log1p CP10k: values of a Gaussian head" in evaluated.path("report").read_text()
