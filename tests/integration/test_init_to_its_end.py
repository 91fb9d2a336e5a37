"""The job that `scldm init` writes for a file runs as it is, to its report, and leaves a model that makes cells."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from typer.testing import CliRunner

import scldm
from pipeline.cli.app import app
from pipeline.config.job import STAGES
from pipeline.core.manifest import newest_manifest

pytestmark = [pytest.mark.integration, pytest.mark.slow]
TYPES = ("B cell", "T cell", "monocyte")


def write_cells(path, n: int = 300, n_genes: int = 150) -> None:
    """Three types, each with thirty genes of its own at ten times the level; raw counts, symbols for names."""
    rng = np.random.default_rng(0)
    of = rng.integers(0, len(TYPES), n)
    level = np.full((len(TYPES), n_genes), 0.3)
    for k in range(len(TYPES)):
        level[k, 30 * k : 30 * (k + 1)] = 3.0
    counts = rng.poisson(level[of] * rng.lognormal(0, 0.2, (n, 1)))
    obs = pd.DataFrame({"louvain": pd.Categorical([TYPES[k] for k in of])}, index=[f"cell-{i}" for i in range(n)])
    obs["n_counts"] = counts.sum(1)
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)])
    anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var).write_h5ad(path)


def scldm_says(*words) -> str:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_job_of_a_file_runs_to_its_report_unchanged(tmp_path, monkeypatch, ray_cluster):
    monkeypatch.chdir(tmp_path)
    write_cells("cells.h5ad")
    scldm_says("init", "cells.h5ad", "--label", "louvain", "-o", "jobs/mine.yaml")
    ran = scldm_says("run", "jobs/mine.yaml")
    done = {stage: newest_manifest(tmp_path / "runs" / "cells", stage) for stage in STAGES}
    assert all(done.values()), ran
    assert done["evaluate"].path("report").is_file()
    assert "nothing to do" in scldm_says("run", "jobs/mine.yaml")

    model = scldm.load(tmp_path / "runs" / "cells")
    made = model.generate({"louvain": "B cell"}, n=100, seed=1)
    own, others = made.X[:, :30].sum(), made.X[:, 30:90].sum()
    assert own > 2 * others, "B cells express the genes of B cells"  # 90 to 18 in the data
