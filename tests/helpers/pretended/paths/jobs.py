"""Paths of the jobs: what their actors do on a GPU, run in this process and without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

import scldm
from helpers.models.small_models import CELL_TYPES, DONORS, GENES, random_weights, write_flow, write_vae
from helpers.pretended.paths import Paths
from helpers.pretended.small import cells_table
from helpers.stages.cell_stages import here, run_stage, write_soma
from helpers.stages.distil_case import config_of, context_of
from helpers.stages.distil_case import local_pool as solver_pool
from helpers.stages.generation_case import generate, write_inputs
from helpers.stages.real_cell_jobs import ALL, USES_FLOW
from helpers.stages.screen_case import SOURCE, context, folder, predict_error, screen_inputs
from pipeline.config.job import STAGE_CONFIGS
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.stages.encode import Encoder, EncoderSpec
from pipeline.stages.perturb import run as perturb
from pipeline.stages.training.distil import solve
from pipeline.training.objectives.samples import FlowSamples
from scldm.checkpoints.native import load_flow, load_vae, save_flow
from scldm.flow.config import ControlStart, Distilled, PathConfig
from scldm.metrics.distribution.device_pairs import pair_means_on, present_device
from scldm.nn.config import DiTConfig
from scldm.nn.dit import DiT

ROWS = [{"cell_type": "B", "donor": "d1", "n_cells": 7}, {"cell_type": "T", "n_cells": 5, "guidance": 2.0}]
START = ControlStart(label="donor", control="d1", share=0.5)
CARRIED = {"to": {"donor": "d_2"}, "start": "control", "cells": {"where": {"donor": "d1"}}}


def paths(root: Path) -> Paths:
    made = _models(root)
    found: Paths = {stage: _applied(root, made, stage) for stage in ALL}
    moved = {"flow": {"steps": 4}}
    found |= {
        "perturb by changed counts": _applied(root, made, "perturb", counts="changed"),
        "perturb from control cells": _applied(root, made | {"flow": made["controls"]}, "perturb", **CARRIED),
        "perturb from noise": _applied(root, made, "perturb", start="noise", **moved),
        "embed with max_genes": _applied(root, made, "embed", max_genes=3),
        "encode": lambda: _encode(root, made["vae"]),
        "samples during training": lambda: _samples(made),
        "pair means of evaluate": _pair_means,
    }
    for head in ("nb_shared", "gaussian"):
        found[f"generate, head {head}"] = _generated(root / f"generate-{head}", {}, head=head)
    found |= {
        "generate, mutually exclusive labels": _generated(root / "generate-one", {}, strategy="mutually_exclusive"),
        "generate by way of control cells": _generated(root / "generate-controls", {"start": "control"}, start=START),
        "generate, some genes": _generated(root / "generate-genes", {"genes": list(GENES[:3])}),
        "generate, distilled": _generated(
            root / "generate-distilled",
            {"cells": [ROWS[0]]},
            distilled=Distilled(evaluations=2, guidance=1.0, teacher="t"),
        ),
        "trajectories of a teacher": lambda: _trajectories(root / "distil"),
        "a screen: encode, predict_error, pooled means": lambda: _screen(root / "screen"),
    }
    return found


def _models(root: Path) -> dict[str, Any]:
    labels = (CELL_TYPES, DONORS)
    vae = write_vae(root / "vae", *labels, genes_seq_len=None)
    flow, controls = write_flow(root / "flow", *labels), write_flow(root / "controls", *labels, start=START)
    return {"vae": str(vae), "flow": str(flow), "controls": str(controls), "source": write_soma(root / "soma")}


def _applied(root: Path, made: dict[str, Any], stage: str, **settings: Any) -> Callable[[], None]:
    """Return a path: a job on 70 real cells in two shards, in the default precision of a GPU."""

    def path() -> None:
        model = {"vae": made["vae"]} | ({"flow": made["flow"]} if stage in USES_FLOW else {})
        given = {"source": made["source"], "model": model, "shard_size": 40, **ALL[stage], **settings}
        cells = scldm.open_cells(run_stage(stage, root / f"{stage}-{len(list(root.iterdir()))}", given)).to_anndata()
        assert cells.n_obs in (70, int((cells.obs["donor"] == "d1").sum()))
        for values in (*cells.obsm.values(), *cells.layers.values()):
            assert np.isfinite(np.asarray(values)).all()

    return path


def _encode(root: Path, vae: str) -> None:
    (root / "latents").mkdir(exist_ok=True)
    encoder = Encoder(EncoderSpec(Path(vae), root / "latents", ("cell_type",), batch_size=8, threads=1, fault=""))
    assert encoder.device.type == "cuda"
    z = encoder._latents(cells_table(20, n_genes=len(GENES)))
    assert np.isfinite(z["latent"].combine_chunks().flatten().to_numpy()).all()


def _generated(root: Path, settings: dict[str, Any], **models: Any) -> Callable[[], None]:
    """Return a path: a generate job in shards of nine cells; `models` are settings of the models."""

    def path() -> None:
        given = {"cells": ROWS, "seed": 7, "shard_size": 9, **settings}
        facts = generate(root / "job", write_inputs(root, **models), **given)
        shards = [anndata.read_h5ad(root / "job" / s["file"]) for s in facts["shards"]]
        assert sum(s.n_obs for s in shards) == sum(row["n_cells"] for row in given["cells"])
        assert all(np.isfinite(s.obsm["X_scldm"]).all() for s in shards)

    return path


def _trajectories(root: Path) -> None:
    inputs = write_inputs(root / "models")
    teacher = inputs["train_flow"].path("model")
    records = solve(config_of(guidance=2.0), context_of(root / "job", inputs), teacher, solver_pool)
    assert sum(r["n_cells"] for r in records) >= 48


def _screen(root: Path) -> None:
    """All of it on the device: the encoder of a screen, the short trainings of predict_error, pooled means."""
    inputs = screen_inputs(root)
    assert (predict_error(root, inputs) / "predicted_errors.csv").is_file()
    data = IngestedDataset.open(inputs["ingest"])
    m, e = inputs["train_vae"].facts["latent_shape"]
    config = DiTConfig(d_model=12, n_layers=1, n_heads=2)
    dit = random_weights(DiT(config, n_latent_tokens=m, latent_width=e, n_classes=data.vocabulary.n_classes))
    save_flow(
        folder(root, "train_flow") / "model", {"model": dit.state_dict(), "raw": dit.state_dict()}, config=config,
        path=PathConfig(), latent_shape=(m, e), vocabulary=data.vocabulary, library_sizes=data.library_sizes,
        card="untrained",
    )  # fmt: skip
    flow = Manifest("train_flow", "v", str(folder(root, "train_flow")), {}, {}, {"model": "model"}, 1.0, 1.0)
    write_manifest(flow)
    settings = {"method": "pooled", "source": SOURCE, "cells": {"where": {"treatment": "control"}},
                "to": {"treatment": "treatment 1"}, "shard_size": 64, "flow": {"steps": 2}}  # fmt: skip
    perturb_config = STAGE_CONFIGS["perturb"].model_validate(settings)
    facts = perturb(perturb_config, context(folder(root, "perturb"), inputs | {"train_flow": flow}), pool=here)
    assert facts["method"] == "pooled"


def _samples(made: dict[str, Any]) -> None:
    vae, flow = (load(Path(made[k]), device="cuda") for load, k in ((load_vae, "vae"), (load_flow, "flow")))
    rng = np.random.default_rng(0)

    def real(n: int) -> anndata.AnnData:
        classes = {x.name: pd.Categorical(rng.choice(x.classes, n)) for x in (CELL_TYPES, DONORS)}
        counts = rng.poisson(3.0, (n, len(GENES))).astype(np.float32)
        return anndata.AnnData(counts, pd.DataFrame(classes, index=map(str, range(n))), pd.DataFrame(index=list(GENES)))

    samples = FlowSamples(real(48), real(192), vae, path=flow.path, every=1, seed=0)
    found = samples.scores(flow.dit)
    assert np.isfinite(found["gen_w2"])


def _pair_means() -> None:
    device, x = present_device(), np.random.default_rng(0).normal(size=(10, 3))
    assert device is not None
    weights = np.full((2, 10), 0.1)
    found = pair_means_on(device, x, x, [lambda d2: (-d2).exp()], u=weights, v=weights)
    d2 = ((x[:, None] - x[None]) ** 2).sum(-1)
    np.testing.assert_allclose(found, np.full((1, 2), np.exp(-d2).mean()))
