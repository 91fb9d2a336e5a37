"""What every training worker runs, under Ray Train or under torchrun.

It receives plain data, validates it again, builds the objective, trains, and lets rank 0 export the model folder.

    torchrun --nproc_per_node 2 -m pipeline.training.worker SPEC.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import torch.distributed as dist

from pipeline.config.job import TrainFlowConfig, TrainVaeConfig
from pipeline.config.resources import CheckpointStorage
from pipeline.core.faults import arm
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import Ingested
from pipeline.tracking.tracker import StageTracker
from pipeline.training.checkpoints.remote import Remote
from pipeline.training.checkpoints.selection import CannotResume
from pipeline.training.loop import run_training
from pipeline.training.objectives.dispersion import fit_dispersions
from pipeline.training.objectives.flow import FlowDraws, FlowObjective
from pipeline.training.objectives.vae import VaeObjective, seen_seed, validation_tables
from pipeline.training.resilience.step_guard import TrainingStopped
from pipeline.training.resilience.stop_signal import STOP_FILE
from pipeline.training.state import Run, Stopped, Trained
from pipeline.training.tasks.joint import VAE_FOLDERS, train_joint
from pipeline.training.tasks.sources import flow_samples, latent_blocks, make_order
from scldm.checkpoints.native import save_flow, save_vae
from scldm.config import StrictModel
from scldm.errors import InputError
from scldm.nn.dit import DiT
from scldm.nn.flops import dit_flops, vae_flops
from scldm.nn.vae import VAE

STOPPED_EXIT = 75  # EX_TEMPFAIL: nothing is wrong, run again


class WorkerSpec(StrictModel):
    """All that a worker needs, as plain data."""

    kind: Literal["vae", "flow"]
    config: dict[str, Any]
    inputs: dict[str, dict[str, Any]]  # manifests
    folder: str
    version: str
    seed: int
    feed_engine: Literal["ray", "local"]
    tracker: dict[str, Any]
    threads: int = 1
    card: str = ""
    storage: CheckpointStorage = CheckpointStorage()
    run_name: str = ""  # <name>/<stage>/<version>: the run's folder in the second place of checkpoints
    fault: str | None = None  # the driver's; None: that of the environment


def train_worker(
    raw: dict[str, Any],
    on_checkpoint: Callable[[dict[str, float]], None] | None = None,
    preempted: Callable[[], float | None] | None = None,
) -> dict[str, Any]:
    """Train; the process group is up. Returns the facts of the stage: rank 0's, which alone hold the fit of theta.

    Raises Stopped where a notice ended the run, with its work in a checkpoint.
    """
    spec = WorkerSpec.model_validate(raw)
    arm(spec.fault)
    torch.set_num_threads(spec.threads)
    tracker = StageTracker.attach(spec.tracker if dist.get_rank() == 0 else {})
    tracker.tag("scldm.world_size", dist.get_world_size())
    remote = None
    if spec.storage.storage_path is not None and dist.get_rank() == 0:
        remote = Remote(spec.storage, spec.run_name)
    run = Run(
        Path(spec.folder), spec.version, spec.feed_engine, tracker, on_checkpoint or (lambda metrics: None),
        remote=remote, storage=spec.storage, preempted=preempted,
    )  # fmt: skip
    inputs = {k: Manifest(**v) for k, v in spec.inputs.items()}
    try:
        return (_train_vae if spec.kind == "vae" else _train_flow)(spec, inputs, run)
    finally:
        tracker.close()


def _train_vae(spec: WorkerSpec, inputs: dict[str, Manifest], run: Run) -> dict[str, Any]:
    config = TrainVaeConfig.model_validate(spec.config)
    data = Ingested.open(inputs["ingest"])
    stats = pd.read_parquet(inputs["ingest"].path("gene_stats"))
    mean = torch.tensor(stats["mean"].to_numpy(), dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        vae = VAE(config.model, n_genes=data.vocabulary.n_genes)
    vae.start_at(mean)
    vae.decoder.kernels = decoder_kernels(config.train.decoder)
    held_out = data.blocks("validation")
    source = data.blocks("train")
    train = config.train
    tables = validation_tables(
        held_out, n_cells=train.validation_cells, batch_size=train.feed.micro_batch_size, seed=spec.seed
    )
    objective = VaeObjective(
        vae,
        labels=[x.name for x in data.vocabulary.labels],
        mean_counts=mean,
        genes_seen=train.genes_seen,
        genes_per_step=train.genes_per_step,
        max_genes=train.feed.max_genes,
        seed=spec.seed,
        validation=tables,
        measured=None if data.measured is None else torch.from_numpy(data.measured),
    )
    order = make_order(source, train.feed, spec.seed)
    n_genes = data.vocabulary.n_genes
    flops = vae_flops(
        config.model, n_genes=min(train.genes_per_step or n_genes, n_genes),
        expressed=float(data.facts["mean_expressed_genes"]),
    )  # fmt: skip
    trained = run_training(objective, source, order, train, replace(run, flops_per_cell=flops))
    state = trained.engine.export_state(trained.checkpoint)
    fitted: dict[str, Any] = {}
    if dist.get_rank() == 0:
        final = VAE(config.model, n_genes=data.vocabulary.n_genes)
        final.load_state_dict(state)
        if train.theta_cells and final.log_theta is not None:
            fitted = fit_dispersions(final, objective, source, train, seed=spec.seed)
        save_vae(run.folder / "model", final, data.vocabulary, data.library_sizes, card=spec.card)
    dist.barrier()
    shape = [config.model.n_latent_tokens, config.model.latent_width]
    seen = {**train.genes_seen.model_dump(mode="json"), "job_seed": spec.seed, "epoch_0_seed": seen_seed(spec.seed, 0)}
    return _facts(trained, train.export, vae) | {"latent_shape": shape, "genes_seen": seen, "theta": fitted}


def _train_flow(spec: WorkerSpec, inputs: dict[str, Manifest], run: Run) -> dict[str, Any]:
    config = TrainFlowConfig.model_validate(spec.config)
    if config.vae.train:
        trained, both = train_joint(config, inputs, run, seed=spec.seed, card=spec.card)
        shape = [both.vae.config.n_latent_tokens, both.vae.config.latent_width]
        return _facts(trained, config.train.export, both) | {"vae": VAE_FOLDERS, "latent_shape": shape}
    data = Ingested.open(inputs["ingest"])
    encoded = inputs["encode"]
    m, e = encoded.facts["latent_shape"]
    n_classes = data.vocabulary.n_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        dit = DiT(config.model, n_latent_tokens=m, latent_width=e, n_classes=n_classes)
    train = config.train
    source = latent_blocks(encoded, "train")
    order = make_order(source, train.feed, spec.seed)
    tables = validation_tables(
        latent_blocks(encoded, "validation"), n_cells=train.validation_cells,
        batch_size=train.feed.micro_batch_size, seed=spec.seed,
    )  # fmt: skip
    objective = FlowObjective(
        dit,
        path=config.flow,
        n_classes=n_classes,
        draws=FlowDraws(
            spec.seed,
            order,
            order.lanes_of(dist.get_rank(), dist.get_world_size()),
            latent_shape=(m, e),
            n_labels=len(n_classes),
        ),
        label_dropout=config.model.label_dropout,
        validation=tables,
        samples=flow_samples(config, inputs, data, spec.seed) if dist.get_rank() == 0 else None,
    )
    run = replace(run, flops_per_cell=dit_flops(config.model, n_latent_tokens=m, latent_width=e))
    trained = run_training(objective, source, order, train, run, ema_config=train.ema)
    raw = trained.engine.export_state(trained.checkpoint)
    assert trained.ema is not None
    if dist.get_rank() == 0:
        averaged = {**raw, **{k: v.float().cpu() for k, v in trained.ema.state_dict().items()}}
        save_flow(
            run.folder / "model", {"model": averaged, "raw": raw}, config=config.model, path=config.flow,
            latent_shape=(m, e), vocabulary=data.vocabulary, library_sizes=data.library_sizes, card=spec.card,
        )  # fmt: skip
    dist.barrier()
    return _facts(trained, train.export, dit)


def decoder_kernels(asked: Literal["torch", "triton"]) -> Literal["torch", "triton"]:
    if asked == "triton" and not torch.cuda.is_available():
        raise InputError(
            "train.decoder (triton) needs a CUDA device, and this worker has none; set resources.gpus_per_worker=1 on "
            "machines with GPUs, or train.decoder=torch"
        )
    return asked


def _facts(trained: Trained, weights: str, module: torch.nn.Module) -> dict[str, Any]:
    trained.close()
    guard, best = trained.memory.guard, trained.memory.best
    return {
        "model": "model",
        "exported": {"weights": weights, "step": trained.exported},
        "skipped_steps": guard.skipped,
        "stopped_early": best.stopped,
        "checkpoint": str(Path("checkpoints") / trained.checkpoint.name),
        "steps": trained.steps,
        "n_parameters": sum(p.numel() for p in module.parameters()),
        "metrics": trained.metrics,
    }


def main() -> None:
    """Entry point under torchrun."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        arm()
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_rank() == 0:
        (Path(spec["folder"]) / STOP_FILE).unlink(missing_ok=True)  # it was for the run before
    dist.barrier()
    try:
        facts = train_worker(spec)
    except Stopped as stopped:
        if dist.get_rank() == 0:
            print(stopped, flush=True)
        sys.exit(STOPPED_EXIT)
    except CannotResume as error:
        if dist.get_rank() == 0:
            print(error, file=sys.stderr, flush=True)
        sys.exit(2)
    except TrainingStopped as stopped:
        if dist.get_rank() == 0:
            print(stopped, file=sys.stderr, flush=True)
        sys.exit(1)
    if dist.get_rank() == 0:
        print(json.dumps(facts), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
