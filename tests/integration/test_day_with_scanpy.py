"""The notebook that trains, as its reader runs it: from raw counts to maps, marker genes, differences and a file."""

from __future__ import annotations

import runpy
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

pytestmark = pytest.mark.integration
DOCS = Path(__file__).resolve().parents[2] / "docs"
SHORT = {
    "train_vae.train.max_steps": 60, "train_flow.train.max_steps": 60, "generate.n_cells": 60,
    "train_vae.train.validation_cells": 32, "train_flow.train.validation_cells": 32,
}  # fmt: skip


def three_types(n: int = 300, genes: int = 90) -> anndata.AnnData:
    rng = np.random.default_rng(0)
    of = rng.integers(0, 3, n)
    level = np.where(np.arange(genes)[None] // (genes // 3) == of[:, None], 4.0, 0.6)
    obs = pd.DataFrame({"cell_type": np.array(["B", "NK", "T"])[of]}, index=[f"cell-{i}" for i in range(n)])
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(genes)])
    return anndata.AnnData(sp.csr_matrix(rng.poisson(level).astype(np.float32)), obs=obs, var=var)


def test_every_cell_of_the_day_with_scanpy_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    three_types().write_h5ad(tmp_path / "cells.h5ad")
    execute = runpy.run_path(str(DOCS / "notebooks" / "execute.py"))
    notebook = execute["executed"](
        "a_day_with_scanpy", {"cells_file": "cells.h5ad", "settings": SHORT, "n_genes": 60}, tmp_path
    )
    code = [c for c in notebook.cells if c.cell_type == "code"]
    pictures = sum("image/png" in o.get("data", {}) for c in code for o in c.outputs)
    assert pictures == 2, "the loss of the VAE, and the map"
    made = anndata.read_h5ad(tmp_path / "generated.h5ad")
    assert made.shape == (300, 60)
    assert set(made.obs["cell_type"]) == {"B", "NK", "T"}
    assert (tmp_path / "shared_model" / "vae").is_dir()
    assert (tmp_path / "runs" / "day" / "job.yaml").is_file()
