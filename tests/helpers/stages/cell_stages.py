"""Stages on real cells, run in this process: small models, an h5ad file, no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from helpers.models.small_models import CELL_TYPES, DONORS, GENES, write_flow, write_vae
from pipeline.config.context import StageContext
from pipeline.config.job import STAGE_CONFIGS
from pipeline.config.resources import ResourcesConfig
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.data.soma.write import write_experiment
from pipeline.inference.applier import Applier, ApplierSpec

TRACKER = SimpleNamespace(metrics=lambda values, step: None, artifact=lambda path, folder=None: None)


def models(folder: Path, **choices: Any) -> dict[str, str]:
    """Folders of a VAE and a flow that know cell_type and donor; `choices` of the VAE's configuration."""
    vae, flow = folder / "vae", folder / "flow"
    if not vae.exists():
        write_vae(vae, CELL_TYPES, DONORS, genes_seq_len=None, **choices)
        write_flow(flow, CELL_TYPES, DONORS)
    return {"vae": str(vae), "flow": str(flow)}


def real_cells(n: int = 70, seed: int = 0) -> anndata.AnnData:
    """Cells with the model's genes in another order and two more genes; names that are not in order."""
    rng = np.random.default_rng(seed)
    genes = ["x1", *reversed(GENES), "x2"]
    counts = rng.poisson(2.0, (n, len(genes)))
    counts[:, 1] += 1  # no cell is empty over the model's genes
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(CELL_TYPES.classes, n)),
            "donor": pd.Categorical(rng.choice(DONORS.classes, n)),
            "score": rng.random(n),
        },
        index=[f"cell-{i}" for i in rng.permutation(n)],
    )
    return anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=genes))


def write_cells(path: Path, adata: anndata.AnnData | None = None) -> Path:
    (real_cells() if adata is None else adata).write_h5ad(path)
    return path


def write_soma(folder: Path) -> dict[str, Any]:
    """The same cells as a SOMA experiment, which a job reads where it is; the source, as a job names it."""
    adata = real_cells()
    obs = adata.obs.reset_index(names="obs_id")
    ids = list(adata.var_names)
    var = pd.DataFrame({"feature_id": ids, "feature_name": ids, "feature_length": 0})
    return {"type": "soma", "uri": write_experiment(folder, obs, var, [adata.X]).uri}


def here(todo: list[int], spec: ApplierSpec, context: StageContext) -> Iterator[dict[str, Any]]:
    """Makes the shards in this process, one after the other, as one actor would."""
    actor = Applier(spec)
    for shard in todo:
        yield actor.make(shard)


def run_stage(stage: str, folder: Path, settings: dict[str, Any], *, pool: Any = here, seed: int = 0) -> Path:
    """Run a stage in a folder as the runner would, manifest and all; the folder."""
    import importlib

    config = STAGE_CONFIGS[stage].model_validate(settings)
    folder.mkdir(parents=True, exist_ok=True)
    context = StageContext(folder=folder, inputs={}, seed=seed, resources=ResourcesConfig(actors=1), tracker=TRACKER)
    facts = importlib.import_module(f"pipeline.stages.{stage}").run(config, context, pool=pool)
    write_manifest(Manifest(stage, "v", str(folder), config.model_dump(mode="json"), {}, facts, 1.0, 1.0))
    return folder
