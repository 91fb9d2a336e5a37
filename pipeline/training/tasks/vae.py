"""A worker's part of `train_vae`: build the VAE, train it, fit its dispersions and export it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import torch.distributed as dist

from pipeline.config.job import VaeTrainConfig
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.loading.blocks import BlockSource
from pipeline.data.loading.collate import to_cell_batch
from pipeline.training.loop import run_training
from pipeline.training.objectives.base import map_tensors
from pipeline.training.objectives.vae import VaeObjective, seen_seed, validation_tables
from pipeline.training.state import Run
from pipeline.training.tasks.base import Rates, make_order, report_start, training_facts
from pipeline.training.tasks.spec import VaeWorkerSpec
from scldm.checkpoints.gene_vectors import read_gene_vectors
from scldm.checkpoints.native import load_vae, save_vae
from scldm.checkpoints.start_from import adapt, freeze, slow_down, start_vae
from scldm.errors import InputError
from scldm.nn.dispersion import fit_theta
from scldm.nn.flops import vae_flops
from scldm.nn.vae import VAE
from scldm.optim.first_weights import start_at_components
from scldm.optim.lora import merged

FIRST_CELLS = 2048  # training cells that first weights are computed from


def train_vae(spec: VaeWorkerSpec, run: Run) -> dict[str, Any]:
    """Train and export a VAE. Collective. Returns the stage's facts; only rank 0's hold the fit of theta."""
    config, train = spec.config, spec.config.train
    data = IngestedDataset.open(spec.inputs["ingest"])
    n_genes = data.vocabulary.n_genes
    stats = pd.read_parquet(spec.inputs["ingest"].path("gene_stats"))
    mean_counts = torch.tensor(stats["mean"].to_numpy(), dtype=torch.float32)
    source = data.blocks("train")
    vae = new_vae(spec, source, n_genes=n_genes, mean_counts=mean_counts)
    started, rates = _start_from(spec, vae, data)
    objective = VaeObjective(
        vae,
        labels=[x.name for x in data.vocabulary.labels],
        mean_counts=mean_counts,
        genes_seen=train.genes_seen,
        genes_per_step=train.genes_per_step,
        max_genes=train.feed.max_genes,
        seed=spec.seed,
        validation=validation_tables(
            data.blocks("validation"), n_cells=train.validation_cells, batch_size=train.feed.micro_batch_size,
            seed=spec.seed,
        ),
        measured=None if data.measured is None else torch.from_numpy(data.measured),
    )  # fmt: skip
    flops = vae_flops(
        config.model, n_genes=min(train.genes_per_step or n_genes, n_genes),
        expressed=float(data.facts["mean_expressed_genes"]),
    )  # fmt: skip
    order = make_order(source, train.feed, spec.seed)
    result = run_training(objective, source, order, train, replace(run, flops_per_cell=flops), rates=rates)
    state = result.engine.export_state(result.checkpoint)
    fitted: dict[str, float] = {}
    if dist.get_rank() == 0:
        final = VAE(config.model, n_genes=n_genes)
        final.load_state_dict(merged(state, None if config.start_from is None else config.start_from.lora))
        if train.theta_cells and vae.log_theta is not None and vae.log_theta.requires_grad:
            fitted = fit_dispersions(final, objective, source, train, seed=spec.seed)
        save_vae(run.folder / "model", final, data.vocabulary, data.library_sizes, card=spec.card)
    dist.barrier()
    shape = [config.model.n_latent_tokens, config.model.latent_width]
    seen = {**train.genes_seen.model_dump(mode="json"), "job_seed": spec.seed, "epoch_0_seed": seen_seed(spec.seed, 0)}
    facts = {"latent_shape": shape, "genes_seen": seen, "theta": fitted}
    return training_facts(result, train.export, vae) | facts | started


def _start_from(spec: VaeWorkerSpec, vae: VAE, data: IngestedDataset) -> tuple[dict[str, Any], Rates]:
    """Give the VAE the weights that it starts from, if there are any.

    Returns:
        What was taken over, as a fact, and its learning rates.
    """
    if spec.start_from is None or spec.config.start_from is None:
        return {}, {}
    table = spec.config.start_from.gene_embeddings
    vectors = None if table is None else read_gene_vectors(Path(table), "train_vae.start_from.gene_embeddings")
    started = start_vae(vae, data.vocabulary, load_vae(spec.start_from), gene_vectors=vectors)
    started.frozen = freeze(vae, spec.config.start_from.freeze)
    if (lora := spec.config.start_from.lora) is not None:
        adapt(vae, lora, started, seed=spec.seed)
    rates = slow_down(vae, spec.config.start_from.old_learning_rate, started)
    return {"start_from": report_start(spec.start_from, started)}, rates


def new_vae(spec: VaeWorkerSpec, source: BlockSource, *, n_genes: int, mean_counts: torch.Tensor) -> VAE:
    """Initialize a VAE by the seed; its output starts at the genes' mean counts, (g,).

    Every worker computes the same first weights from the same training cells, and DeepSpeed hands out those of rank 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        vae = VAE(spec.config.model, n_genes=n_genes)
    vae.start_at(mean_counts)
    if spec.config.train.first_weights == "components" and spec.start_from is None:
        tables = validation_tables(source, n_cells=FIRST_CELLS, batch_size=FIRST_CELLS, seed=spec.seed)
        start_at_components(vae, [to_cell_batch(table, []) for table in tables])
    vae.decoder.kernels = decoder_kernels(spec.config.train.decoder)
    return vae


def decoder_kernels(requested: Literal["torch", "triton"]) -> Literal["torch", "triton"]:
    """Return the requested kernels. Raises InputError if this worker cannot run them."""
    if requested == "triton" and not torch.cuda.is_available():
        raise InputError(
            "train.decoder (triton) needs a CUDA device, and this worker has none; set resources.gpus_per_worker=1 on "
            "machines with GPUs, or train.decoder=torch"
        )
    return requested


def fit_dispersions(
    vae: VAE, objective: VaeObjective, source: BlockSource, train: VaeTrainConfig, *, seed: int
) -> dict[str, float]:
    """Fit theta of every gene, given the means that the VAE has learned.

    The training cells are drawn by seed, so the fit is a function of the trained weights alone, whatever the number of
    workers that trained them.
    """
    device = next(objective.module.parameters()).device
    tables = validation_tables(source, n_cells=train.theta_cells, batch_size=train.feed.micro_batch_size, seed=seed)
    batches = (map_tensors(objective.prepare_validation(t), lambda x: x.to(device)) for t in tables)
    fit = fit_theta(vae.to(device), (objective.scored_and_seen(b)[0] for b in batches))
    vae.cpu()
    return asdict(fit)
