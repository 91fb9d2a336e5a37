"""A small perturbation screen of synthetic cells, ingested and encoded in this process: no Ray, an untrained VAE."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa

from helpers.models.small_models import random_weights, vae_config
from helpers.stages.cell_stages import TRACKER
from pipeline.config.context import StageContext
from pipeline.config.job import STAGE_CONFIGS, IngestConfig
from pipeline.config.resources import ResourcesConfig
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.stages.encode import Encoder, EncoderSpec, shard_name
from pipeline.stages.ingest import run as ingest
from pipeline.stages.unseen.finished import NO_BETTER_THAN_POOLED
from scldm.checkpoints.native import save_vae
from scldm.nn.vae import VAE

CONTROL = {"treatment": "control"}
HELD_OUT = {"cell_type": "B cell", "treatment": "treatment 1"}
SOURCE = {"type": "synthetic", "n_cells": 700, "n_genes": 40, "n_types": 4, "n_treatments": 2, "n_donors": 1}
SMALL = {
    "control": CONTROL, "folds": 2, "seeds": 2, "base_steps": 4, "steps": 3, "batch_size": 32, "sampler_steps": 2,
    "cells": 25, "model": {"d_model": 8, "n_layers": 1, "n_heads": 2},
}  # fmt: skip


def screen_inputs(root: Path, **ingest_settings: Any) -> dict[str, Manifest]:
    """Manifests of ingest, train_vae and encode under root; one combination is held out."""
    settings = {
        "source": SOURCE, "labels": ["cell_type", "treatment"],
        "split": {"validation": 0.1, "held_out": {"combinations": [HELD_OUT]}}, **ingest_settings,
    }  # fmt: skip
    config = IngestConfig.model_validate(settings)
    made = {"ingest": _manifest(root, "ingest", ingest(config, context(folder(root, "ingest"), {})), {})}
    data = IngestedDataset.open(made["ingest"])
    vae = random_weights(VAE(vae_config(genes_seq_len=None), n_genes=data.vocabulary.n_genes))
    model = folder(root, "train_vae") / "model"
    save_vae(model, vae, data.vocabulary, data.library_sizes, card="untrained")
    facts = {"model": "model", "latent_shape": [3, 4]}
    made["train_vae"] = _manifest(root, "train_vae", facts, {"ingest": made["ingest"]})
    made["encode"] = _manifest(root, "encode", _encoded(folder(root, "encode"), data, model), made)
    return made


def _encoded(at: Path, data: IngestedDataset, model: Path) -> dict[str, Any]:
    """Encode the training cells as an actor would."""
    latents, names = at / "latents", tuple(x.name for x in data.vocabulary.labels)
    latents.mkdir(exist_ok=True)
    encode = Encoder(EncoderSpec(model, latents, names, batch_size=64, threads=1, fault=""))
    blocks = data.blocks("train")
    cells = blocks.read(blocks.ids)
    cells = cells.append_column("split", pa.array(["train"] * len(cells)))
    record = encode(cells.append_column("shard", pa.array([0] * len(cells)))).to_pylist()[0]
    assert record["file"] == shard_name("train", 0)
    return {"latents": "latents", "shards": {"train": [record]}, "latent_shape": [3, 4]}


def folder(root: Path, stage: str, version: str = "v") -> Path:
    path = root / stage / version
    path.mkdir(parents=True, exist_ok=True)
    return path


def context(at: Path, inputs: dict[str, Manifest], seed: int = 0) -> StageContext:
    return StageContext(folder=at, inputs=inputs, seed=seed, resources=ResourcesConfig(actors=1), tracker=TRACKER)


def _manifest(root: Path, stage: str, facts: dict[str, Any], inputs: dict[str, Manifest]) -> Manifest:
    versions = {k: m.version for k, m in inputs.items()}
    made = Manifest(stage, "v", str(folder(root, stage)), {}, versions, facts, seconds=1.0, finished_at=1.0)
    write_manifest(made)
    return made


def predict_error(root: Path, inputs: dict[str, Manifest], *, version: str = "v", seed: int = 0, **more: Any) -> Path:
    """Run predict_error as the runner would, manifest and all; its folder."""
    from pipeline.stages.unseen.predict_error import run

    config = STAGE_CONFIGS["predict_error"].model_validate({**SMALL, **more})
    at = folder(root, "predict_error", version)
    facts = run(config, context(at, inputs, seed))
    versions = {k: m.version for k, m in inputs.items()}
    write_manifest(
        Manifest("predict_error", version, str(at), config.model_dump(mode="json"), versions, facts, 1.0, 2.0)
    )
    return at


def write_predictions(
    root: Path, of: Manifest, version: str = "v", *, method: str = "shift", verdict: str = NO_BETTER_THAN_POOLED,
    finished_at: float = 1.0, **facts: Any,
) -> None:  # fmt: skip
    """Write a finished predict_error of the pipeline `root` that says the same of HELD_OUT every time."""
    at = folder(root, "predict_error", version)
    names = ("cell_type", "treatment", "delta_pearson", "delta_pearson_low", "delta_pearson_high", "verdict")
    with (at / "predicted_errors.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, [*HELD_OUT.values(), 0.4, 0.2, 0.6, verdict]])
    known = {"predicted": "predicted_errors.csv", "report": "predicted_errors.html", "method": method,
             "data": of.facts["digest"], "labels": ["cell_type", "treatment"], "control": CONTROL}  # fmt: skip
    write_manifest(Manifest("predict_error", version, str(at), {}, {}, known | facts, 1.0, finished_at))
