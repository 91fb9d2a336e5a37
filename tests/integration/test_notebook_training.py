"""One call in a notebook runs the stages of the jobs: the command line has nothing left to do."""

from __future__ import annotations

import hashlib
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from typer.testing import CliRunner

import scldm
from pipeline.cli.app import app

pytestmark = pytest.mark.integration
SHORT = {
    "train_vae.train.max_steps": 20, "train_flow.train.max_steps": 20, "generate.n_cells": 60,
    "train_vae.train.validation_cells": 32, "train_flow.train.validation_cells": 32,
}  # fmt: skip


def some_cells() -> anndata.AnnData:
    rng = np.random.default_rng(0)
    of = rng.integers(0, 2, 240)
    level = np.where(np.arange(60)[None] // 30 == of[:, None], 4.0, 0.5)
    obs = pd.DataFrame({"louvain": pd.Categorical(np.array(["B", "T"])[of])}, index=[f"cell-{i}" for i in range(240)])
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(60)])
    return anndata.AnnData(sp.csr_matrix(rng.poisson(level).astype(np.float32)), obs=obs, var=var)


def of_models_and_cells(pipeline: Path) -> dict[str, str]:
    """Digests of what was trained and generated; stage and file name -> sha256."""
    found = [*pipeline.glob("train_*/*/model/*.safetensors"), *pipeline.glob("generate/*/cells/*.h5ad")]
    assert len(found) >= 4, found
    return {f"{p.relative_to(pipeline)}": hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def test_one_call_trains_without_ray_what_the_job_that_it_writes_trains_on_ray(tmp_path, ray_cluster, capsys):
    model = scldm.train(some_cells(), "louvain", name="mine", output=tmp_path / "runs", seed=3, settings=SHORT)
    said = capsys.readouterr().out
    assert "louvain" in said
    assert model.labels == {"louvain": ("B", "T")}
    assert model.generate({"louvain": "B"}, n=5, seed=1).shape == (5, 60)
    history = model.history
    assert history.loc["train_vae", "train/loss"].dropna().size > 0
    assert "<html" in model.report().path.read_text()[:500].lower()

    job, overrides = tmp_path / "runs" / "mine" / "job.yaml", [f"{k}={v}" for k, v in SHORT.items()]
    again = CliRunner().invoke(app, ["run", str(job), "seed=3", *overrides])
    assert again.exit_code == 0, again.output
    assert "nothing to do" in again.output, "the command line would do the same stages"
    on_ray = ["resources.ray=true", f"output={tmp_path / 'on_ray'}"]
    there = CliRunner().invoke(app, ["run", str(job), "seed=3", *overrides, *on_ray])
    assert there.exit_code == 0, there.output
    assert of_models_and_cells(tmp_path / "runs" / "mine") == of_models_and_cells(tmp_path / "on_ray" / "mine")

    repeated = scldm.train(some_cells(), ["louvain"], name="mine", output=tmp_path / "runs", seed=3, settings=SHORT)
    assert "nothing to do" in capsys.readouterr().out
    assert repeated.folders == model.folders
