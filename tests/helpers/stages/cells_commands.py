"""A finished stage of cells, its commands, and ways to spoil it."""

from __future__ import annotations

import hashlib
import json

import anndata
import numpy as np
import pandas as pd
from typer.testing import CliRunner

from helpers.stages.cell_stages import models, run_stage, write_soma
from pipeline.cli.app import app


def reconstructed(root):
    """The folder of a stage with counts and latents."""
    config = {"source": write_soma(root / "soma"), "model": {"vae": models(root)["vae"]}, "shard_size": 30}
    return run_stage("reconstruct", root / "stage", config)


def equal(a, b):
    pd.testing.assert_frame_equal(a.obs, b.obs)
    assert list(a.var_names) == list(b.var_names)
    assert (a.X != b.X).nnz == 0
    np.testing.assert_array_equal(a.obsm["X_scldm"], b.obsm["X_scldm"])


def run(*words):
    return CliRunner().invoke(app, ["cells", *map(str, words)])


def rewrite(folder, k, change):
    """Change a shard and make the manifest agree with its bytes: what only a look inside can find."""
    path = folder / "cells" / f"part-{k:05d}.h5ad"
    adata = anndata.read_h5ad(path)
    changed = change(adata)
    (adata if changed is None else changed).write_h5ad(path)
    rehash(folder, k)


def rehash(folder, k):
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "cells" / f"part-{k:05d}.h5ad").read_bytes()
    manifest["facts"]["shards"][k]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
