"""A VAE training that takes seconds: its data, its settings, and the specification of its workers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig, TrainVaeConfig
from pipeline.core.manifest import Manifest
from pipeline.stages import ingest

STEPS, EVERY = 12, 4
TRAIN = {
    "max_steps": STEPS, "checkpoint_every": EVERY, "validate_every": 6, "validation_cells": 32, "genes_per_step": 40,
    "feed": {"batch_size": 32, "micro_batch_size": 8, "lanes": 4}, "keep_last": 2, "keep_best": 1,
}  # fmt: skip
MODEL = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 4, "latent_width": 4}


def ingest_small(folder: Path, n_cells: int = 300, **settings: Any) -> Manifest:
    """Ingest made-up cells of 80 genes."""
    source = {"type": "synthetic", "n_cells": n_cells, "n_genes": 80, "n_types": 3}
    context = StageContext(folder, {}, 0, SimpleNamespace(), None)
    facts = ingest.run(IngestConfig.model_validate({"source": source, **settings}), context)
    return Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0)


def spec_of(folder: Path, ingested: Manifest, storage: dict[str, Any] | None = None, **settings) -> dict[str, Any]:
    """Make a worker's specification, as JSON has it; `settings` are those of `train`."""
    config = TrainVaeConfig.model_validate({"model": MODEL, "train": {**TRAIN, **settings}})
    return {
        "kind": "vae", "config": config.model_dump(mode="json"), "inputs": {"ingest": asdict(ingested)},
        "folder": str(folder), "version": "v", "seed": 0, "feed_engine": "local", "tracker": {},
        "storage": storage or {}, "run_name": "job/train_vae/v",
    }  # fmt: skip
