"""What a worker trains on: blocks of latents, their order, and cells to compare generated ones with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.job import FeedConfig, TrainFlowConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.loading.blocks import IpcBlocks
from pipeline.data.loading.order import FeedOrder
from scldm.checkpoints.native import load_vae
from scldm.errors import InputError

if TYPE_CHECKING:
    from pipeline.training.objectives.samples import FlowSamples


def flow_samples(
    config: TrainFlowConfig, inputs: dict[str, Manifest], data: IngestedDataset, seed: int
) -> FlowSamples | None:
    """Cells to generate on a schedule, where `train.sample_every` asks for it."""
    every, n = config.train.sample_every, config.train.sample_cells
    if every is None:
        return None
    from pipeline.training.objectives.samples import (
        FlowSamples,  # scikit-learn and the report: seconds of a worker's start
    )

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    vae = load_vae(inputs["train_vae"].path("model"), device=device)
    held_out = data.anndata("validation", max_cells=n, seed=seed)
    training = data.anndata("train", max_cells=4 * n, seed=seed)
    return FlowSamples(held_out, training, vae, path=config.flow, every=every, seed=seed)


def latent_blocks(encoded: Manifest, split: str) -> IpcBlocks:
    """The latent cache of a split, as a source of blocks."""
    if split not in encoded.facts["shards"]:
        raise InputError(f"the latent cache {encoded.folder} holds no {split} cells; add {split} to encode.splits")
    files = encoded.facts["shards"][split]
    return IpcBlocks(str(encoded.path("latents")), tuple((f["file"], f["n_cells"]) for f in files))


def make_order(source: Any, config: FeedConfig, seed: int) -> FeedOrder:
    return FeedOrder(source.ids, source.tile, seed, config.batch_size, config.lanes, config.block_rows)
