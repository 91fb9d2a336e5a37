"""The VAE and the flow trained together on two workers: both learn, both are exported, and they belong together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig, TrainFlowConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.stages import ingest
from scldm.checkpoints.native import load_flow, load_vae, save_vae
from scldm.generation.cell_maker import check_pair
from scldm.nn.config import VAEConfig
from scldm.nn.vae import VAE

pytestmark = pytest.mark.multiprocess
STEPS = 30
VAE_MODEL = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 4, "latent_width": 4}
CONFIG = {
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
    "vae": {"train": True, "weight": 0.1, "genes_per_step": 40},
    "train": {"max_steps": STEPS, "checkpoint_every": STEPS, "validate_every": 10, "validation_cells": 32,
              "zero_stage": 2, "ema": {"decay": 0.5},
              "feed": {"batch_size": 32, "micro_batch_size": 8, "lanes": 4, "max_genes": 30}},
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Manifest]:
    """An ingest, and a VAE that has not learned anything yet."""
    folder = tmp_path_factory.mktemp("ingest")
    source = {"type": "synthetic", "n_cells": 300, "n_genes": 80, "n_types": 3}
    facts = ingest.run(
        IngestConfig.model_validate({"source": source}), StageContext(folder, {}, 0, SimpleNamespace(), None)
    )
    made = Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0)
    data = IngestedDataset.open(made)
    torch.manual_seed(0)
    vae = VAE(VAEConfig.model_validate(VAE_MODEL), n_genes=data.vocabulary.n_genes)
    target = tmp_path_factory.mktemp("vae")
    save_vae(target / "model", vae, data.vocabulary, data.library_sizes, card="")
    return {"ingest": made, "train_vae": Manifest("train_vae", "v", str(target), {}, {}, {"model": "model"}, 0.0, 0.0)}


def test_both_networks_learn_and_are_exported_as_a_pair(tmp_path, inputs):
    spec = {
        "kind": "flow", "config": TrainFlowConfig.model_validate(CONFIG).model_dump(mode="json"),
        "inputs": {k: asdict(m) for k, m in inputs.items()}, "folder": str(tmp_path), "version": "v", "seed": 0,
        "feed_engine": "local", "tracker": {},
    }  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "pipeline.training.worker", str(tmp_path / "spec.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    facts = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"model"')))
    assert facts["vae"] == {"ema": "vae", "raw": "vae_raw"}
    assert facts["exported"] == {"weights": "last", "step": STEPS}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [r["val/loss"] for r in rows if "val/loss" in r]
    assert losses == sorted(losses, reverse=True)
    last = rows[-1]
    assert last["val/loss"] == pytest.approx(last["val/flow"] + 0.1 * last["val/nll"]), (
        "its parts stand beside the loss"
    )

    before = load_vae(inputs["train_vae"].path("model")).vae.state_dict()
    for side, folder in facts["vae"].items():
        vae, flow = load_vae(tmp_path / folder), load_flow(tmp_path / "model", weights=side)
        check_pair(vae, flow)
        moved = [k for k, v in vae.vae.state_dict().items() if not torch.equal(v, before[k])]
        assert any(k.startswith("encoder") for k in moved)
        assert any(k.startswith("decoder") for k in moved)
    averaged, raw = (load_vae(Path(tmp_path / facts["vae"][s])).vae.state_dict() for s in ("ema", "raw"))
    assert any(not torch.equal(averaged[k], raw[k]) for k in raw)
