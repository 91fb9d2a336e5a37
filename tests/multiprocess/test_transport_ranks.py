"""A flow that starts at control cells, trained on real ranks: the same on one and on two, and after a restart."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.training.ranks import KILLED, run, train
from safetensors.torch import load_file

from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig, TrainFlowConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.loading.blocks import LABEL
from pipeline.stages import ingest
from scldm.checkpoints.native import load_flow
from scldm.flow.config import ControlStart, SamplerConfig
from scldm.flow.sampler import sample_latents
from scldm.flow.transport import FromControls

pytestmark = pytest.mark.multiprocess
STEPS, SHIFT = 120, 2.0
CONTROL, TREATED = (f"CD{n}-positive, alpha-beta T cell" for n in (4, 8))
CONFIG = {
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
    "start": {"control": {"cell_type": CONTROL}},
    "train": {"max_steps": STEPS, "checkpoint_every": 40, "validate_every": STEPS, "validation_cells": 32,
              "ema": {"decay": 0.5}, "optimizer": {"lr": 0.01},
              "feed": {"batch_size": 32, "micro_batch_size": 8, "lanes": 4, "block_rows": 64}},
}  # fmt: skip


def latents(cells: Any) -> np.ndarray:
    """Latents (n, 2, 2) of made-up cells: treated cells are shifted along one axis."""
    z = np.random.default_rng(0).normal(size=(len(cells), 4)).astype(np.float32)
    z[:, 0] += SHIFT * cells[LABEL + "cell_type"].to_numpy()
    return z


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Manifest]:
    """An ingest of two types of cells and two donors, and a latent cache in which one type is the shifted other."""
    folder = tmp_path_factory.mktemp("ingest")
    source = {"type": "synthetic", "n_cells": 400, "n_genes": 20, "n_types": 2, "n_donors": 2}
    config = IngestConfig.model_validate({"source": source, "labels": ["cell_type", "donor_id"]})
    facts = ingest.run(config, StageContext(folder, {}, 0, SimpleNamespace(), None))
    made = Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0)
    target, shards = tmp_path_factory.mktemp("encode"), {}
    for split in ("train", "validation"):
        cells = IngestedDataset.open(made).cells_of(split)
        table = pa.table(
            {
                "soma_joinid": cells["soma_joinid"].to_numpy(),
                **{LABEL + x: cells[LABEL + x].to_numpy(np.int32) for x in ("cell_type", "donor_id")},
                "log_library_size": np.ones(len(cells), np.float32),
                "latent": pa.FixedSizeListArray.from_arrays(pa.array(latents(cells).ravel()), 4),
            }
        )
        (target / "latents").mkdir(exist_ok=True)
        with pa.ipc.new_file(target / "latents" / f"{split}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=2048)
        shards[split] = [{"file": f"{split}.arrow", "n_cells": len(cells)}]
    encoded = {"latents": "latents", "latent_shape": [2, 2], "shards": shards}
    return {"ingest": made, "encode": Manifest("encode", "v", str(target), {}, {}, encoded, 0.0, 0.0)}


def spec_of(folder: Path, inputs: dict[str, Manifest]) -> dict[str, Any]:
    return {
        "kind": "flow", "config": TrainFlowConfig.model_validate(CONFIG).model_dump(mode="json"),
        "inputs": {k: asdict(m) for k, m in inputs.items()}, "folder": str(folder), "version": "v", "seed": 0,
        "feed_engine": "local", "tracker": {},
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, inputs) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(spec_of(folder, inputs))
    return folder


def test_the_field_carries_control_cells_to_the_treatment(whole):
    flow = load_flow(whole / "model")
    assert flow.start == ControlStart(label="cell_type", control=CONTROL, share=0.5)
    z = torch.randn(200, 2, 2, generator=torch.Generator().manual_seed(1))
    kinds = {"cell_type": torch.ones(200).long(), "donor_id": torch.zeros(200).long()}
    moved = sample_latents(FromControls(flow.dit), z, kinds, SamplerConfig(), flow.path)
    change = (moved - z).flatten(1)
    assert float(change[:, 0].mean()) == pytest.approx(SHIFT, abs=0.5)
    assert float(change[:, 1:].square().mean()) < 0.5, "what the treatment does not change stays"
    made = sample_latents(flow.dit, z, kinds, SamplerConfig(), flow.path)
    assert float(made.flatten(1)[:, 0].mean()) == pytest.approx(SHIFT, abs=0.7), "and so does the field from noise"


def losses(folder: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {f"{k} at {r['step']}": r[k] for r in rows for k in ("train/loss", "val/loss") if k in r}


def test_one_rank_and_two_have_the_same_losses(tmp_path, whole, inputs):
    assert run(spec_of(tmp_path, inputs), world_size=1) == [0]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-3)


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, whole, inputs):
    assert KILLED in run(spec_of(tmp_path, inputs), fault="training.before_step:step=55:rank=1:kill")
    train(spec_of(tmp_path, inputs))
    one, two = (load_file(x / "model" / "model.safetensors") for x in (tmp_path, whole))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0, msg=name)
