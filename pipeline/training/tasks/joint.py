"""A worker's part of `train_flow` with `vae: {train: true}`: build both networks, train them and export both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.job import TrainFlowConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.training.loop import TrainingResult, run_training
from pipeline.training.objectives.flow import FlowDraws
from pipeline.training.objectives.joint import Joint, JointObjective, part_of
from pipeline.training.objectives.vae import VaeObjective, validation_tables
from pipeline.training.state import Run
from pipeline.training.tasks.base import make_order
from scldm.checkpoints.native import load_vae, new_dit, save_flow, save_vae
from scldm.nn.vae import VAE

# Folders of the two VAEs, next to the flow's: sampling with weights "ema" uses the first, with "raw" the second.
VAE_FOLDERS = {"ema": "vae", "raw": "vae_raw"}


def train_joint(
    config: TrainFlowConfig, inputs: Mapping[str, Manifest], run: Run, *, seed: int, card: str
) -> tuple[TrainingResult, Joint]:
    """Train the VAE of train_vae together with a new flow, and export both. Collective."""
    data = IngestedDataset.open(inputs["ingest"])
    module = _networks(config, inputs, data, seed)
    train, source = config.train, data.blocks("train")
    feed = train.feed
    order = make_order(source, feed, seed)
    labels = [x.name for x in data.vocabulary.labels]
    stats = pd.read_parquet(inputs["ingest"].path("gene_stats"))
    counts = VaeObjective(
        module.vae, labels=labels, mean_counts=torch.tensor(stats["mean"].to_numpy(), dtype=torch.float32),
        genes_per_step=config.vae.genes_per_step, max_genes=feed.max_genes, seed=seed, validation=[],
        measured=None if data.measured is None else torch.from_numpy(data.measured),
    )  # fmt: skip
    m, e = module.vae.config.n_latent_tokens, module.vae.config.latent_width
    lanes = order.lanes_of(dist.get_rank(), dist.get_world_size())
    objective = JointObjective(
        module, counts, FlowDraws(seed, order, lanes, latent_shape=(m, e), n_labels=len(labels)),
        weight=config.vae.weight, n_classes=data.vocabulary.n_classes, label_dropout=config.model.label_dropout,
        validation=validation_tables(
            data.blocks("validation"), n_cells=train.validation_cells, batch_size=feed.micro_batch_size, seed=seed
        ),
    )  # fmt: skip
    result = run_training(objective, source, order, train, run, ema_config=train.ema)
    raw = result.engine.export_state(result.checkpoint)
    assert result.ema is not None
    averaged = {**raw, **{k: v.float().cpu() for k, v in result.ema.state_dict().items()}}
    if dist.get_rank() == 0:
        _export(run.folder, {"ema": averaged, "raw": raw}, config, data, module.vae, card)
    dist.barrier()
    return result, module


def _networks(config: TrainFlowConfig, inputs: Mapping[str, Manifest], data: IngestedDataset, seed: int) -> Joint:
    vae = load_vae(inputs["train_vae"].path("model")).vae.train()
    for p in vae.parameters():
        p.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = (vae.config.n_latent_tokens, vae.config.latent_width)
        dit = new_dit(config.model, data.vocabulary, latent_shape=shape)
    return Joint(vae, dit, path=config.flow)


def _export(
    folder: Path,
    states: Mapping[str, Mapping[str, Tensor]],
    config: TrainFlowConfig,
    data: IngestedDataset,
    vae: VAE,
    card: str,
) -> None:
    for side, state in states.items():
        exported = VAE(vae.config, n_genes=vae.n_genes)
        exported.load_state_dict(part_of(state, "vae"))
        save_vae(folder / VAE_FOLDERS[side], exported, data.vocabulary, data.library_sizes, card=card)
    shape = (vae.config.n_latent_tokens, vae.config.latent_width)
    save_flow(
        folder / "model", {"model": part_of(states["ema"], "dit"), "raw": part_of(states["raw"], "dit")},
        config=config.model, path=config.flow, latent_shape=shape, vocabulary=data.vocabulary,
        library_sizes=data.library_sizes, card=card,
    )  # fmt: skip
