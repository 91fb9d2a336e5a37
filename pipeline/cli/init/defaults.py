"""Defaults that `scldm init` chooses for a source, with reasons: split, sizes, batches, steps. Pure functions.

The sizes are those of this repository's own jobs: of `jobs/demo_h5ad.yaml` on CPUs, of the paper's Dentate Gyrus and
Census models (`scldm presets`) on GPUs. They are starting points, not the best for the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.cli.init.inspect import SourceSummary
from pipeline.cli.init.labels import Labels, donor_column
from scldm.text import shown

MANY_DONORS = 20  # with fewer, a hash of donors may leave a split empty
MANY_GENES = 4096
CELLS_PER_GPU = 128  # of a step: with fewer, a GPU waits for launches of kernels more than it computes
GPU_STEPS, PASSES = 10_000, 100  # least steps of a training on GPUs; passes through the cells that are aimed at
QUICK = 4  # a quick job has this part of the steps
CENSUS_GENES = 60_000  # approximate; not read from the Census


@dataclass(frozen=True)
class Chosen:
    """A chosen value with its reason."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Choices:
    """All settings of a job that depend on the data or the machine."""

    gpus: int
    ray: bool
    workers: int
    machines: str  # what trains, in words
    columns: Mapping[str, str]  # ingest.source.columns: name in the job -> name in the file
    labels: tuple[str, ...]  # names in the job
    missing_label: str
    split: Chosen  # dict
    min_cells: Chosen
    vae: Chosen  # dict: model
    genes_per_step: Chosen
    vae_train: Chosen  # dict: max_steps and what follows
    flow: Chosen
    flow_train: Chosen
    n_generated: Chosen
    shard_size: int


def choose(
    summary: SourceSummary, labels: Labels, *, gpus: int, cpus: int, ray: bool = True, quick: bool = False
) -> Choices:
    """Choose the settings of a job for a source.

    Args:
        gpus: GPUs of the machines; 0 trains on CPUs.
        cpus: Cores of the machine that trains, where there is no GPU.
        ray: Whether the job runs on Ray; without it, on this machine alone.
        quick: A quarter of the steps and of the generated cells, for a first look.
    """
    # Columns of an experiment are read as they are called: no setting renames them.
    columns, names = _names(labels) if summary.kind != "SOMA" else ({}, labels.columns)
    split = _split(summary, columns)
    share = 1 - split.value.get("validation", 0.1) - split.value.get("test", 0.1)
    n_train = round((summary.n_cells - labels.drops) * share)
    workers = _gpu_workers(gpus, n_train) if gpus else min(2, max(1, cpus))
    steps = _gpu_steps if gpus else _cpu_steps
    vae_train, flow_train = steps(n_train, workers, flow=False, summary=summary), steps(n_train, workers, flow=True)
    n_generated = _n_generated(summary, gpus)
    if quick:
        vae_train, flow_train = _quarter(vae_train), _quarter(flow_train)
        n_generated = Chosen(-(-n_generated.value // QUICK), f"a quarter, for a first look; {n_generated.reason}")
    return Choices(
        gpus=gpus,
        ray=ray,
        workers=workers,
        machines=_machines(gpus, workers, n_train) + ("" if ray else "; without Ray, on this machine alone"),
        columns=columns,
        labels=names,
        missing_label="drop" if labels.drops else "error",
        split=split,
        min_cells=_min_cells(summary),
        vae=_vae(summary, gpus),
        genes_per_step=_genes_per_step(summary, gpus),
        vae_train=vae_train,
        flow=_flow(summary, gpus),
        flow_train=flow_train,
        n_generated=n_generated,
        shard_size=25_000 if gpus else 250,
    )


def _names(labels: Labels) -> tuple[dict[str, str], tuple[str, ...]]:
    """Map the columns to names that need no quotes in filters and overrides."""
    columns: dict[str, str] = {}
    names = []
    for column in labels.columns:
        plain = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in column).strip("_") or "label"
        while plain != column and (plain in columns or plain in labels.columns):
            plain += "_"
        if plain != column:
            columns[plain] = column
        names.append(plain)
    return columns, tuple(names)


def _split(summary: SourceSummary, columns: dict[str, str]) -> Chosen:
    """Choose the held-out cells; adds donor_id to `columns` if whole donors are held out."""
    if summary.kind == "Census":
        return Chosen({"by": "tile", "validation": 0.02, "test": 0.02}, "whole storage tiles: they read at full speed")
    share = 0.1 if summary.n_cells < 1_000_000 else 0.02
    shares = {"validation": share, "test": share}
    held = f"{share:.0%} of the cells to validate on and {share:.0%} to test on"
    donors = donor_column(summary.columns)
    n = summary.columns[donors]["n_classes"] if donors is not None else 0
    if donors is not None and n >= MANY_DONORS and not summary.columns[donors]["n_missing"] and summary.kind != "SOMA":
        if donors != "donor_id":
            columns["donor_id"] = donors
        return Chosen(
            {"by": "donor_id", **shares}, f"{held}, whole donors ({n} in {shown(donors)}): scores mean new ones"
        )
    reason = (
        "no column of donors is known" if donors is None else f"{n} donors ({shown(donors)}) are too few to hold out"
    )
    return Chosen({"by": "cell", **shares}, f"{held}; by cell, because {reason}")


def _min_cells(summary: SourceSummary) -> Chosen:
    if summary.kind == "Census" or summary.n_cells < 200:
        return Chosen(0, "every gene of the source")
    return Chosen(3, "a gene that fewer training cells express cannot be learned; 0 keeps every gene")


def _vae(summary: SourceSummary, gpus: int) -> Chosen:
    small = {"d_model": 32, "n_layers": 2, "n_latent_tokens": 16, "latent_width": 16}
    if not gpus:
        return Chosen(small, f"{summary.n_genes:,} genes on CPUs: the small model of jobs/demo_h5ad.yaml")
    if summary.kind == "Census" or summary.n_cells >= 1_000_000:
        large = {"d_model": 512, "n_layers": 8, "n_heads": 8, "n_latent_tokens": 256, "latent_width": 16}
        return Chosen(large, "a million cells or more: the sizes of preset census_70m")
    if summary.n_cells >= 100_000:
        middle = {"d_model": 256, "n_layers": 8, "n_heads": 8, "n_latent_tokens": 128, "latent_width": 16}
        return Chosen(middle, f"{summary.n_cells:,} cells: between presets dentate_gyrus and census_70m")
    paper = {"d_model": 128, "n_layers": 2, "n_heads": 4, "n_latent_tokens": 128, "latent_width": 16}
    return Chosen(paper, f"{summary.n_cells:,} cells: the sizes of preset dentate_gyrus (13,113 training cells)")


def _genes_per_step(summary: SourceSummary, gpus: int) -> Chosen:
    most = 8192 if gpus else 1024
    if summary.n_genes <= 2 * most:
        return Chosen(None, f"all {summary.n_genes:,} genes are scored in every step")
    return Chosen(most, f"of {summary.n_genes:,}: the decoder is the cost; validation scores all of them")


def _flow(summary: SourceSummary, gpus: int) -> Chosen:
    if not gpus:
        model = {"d_model": 96, "n_layers": 4, "n_heads": 4, "label_dropout": 0.1}
        return Chosen(model, "the small DiT of jobs/demo_h5ad.yaml")
    if summary.kind == "Census" or summary.n_cells >= 1_000_000:
        model = {"d_model": 512, "n_layers": 12, "n_heads": 8, "label_dropout": 0.1}
        return Chosen(model, "as jobs/census/train_flow.yaml")
    return Chosen({"d_model": 256, "n_layers": 8, "n_heads": 8, "label_dropout": 0.1}, "the DiT of the paper's Table 9")


def _cpu_steps(n_train: int, workers: int, *, flow: bool, summary: SourceSummary | None = None) -> Chosen:
    """Choose steps as in jobs/demo_h5ad.yaml: more for more cells, within minutes on two cores."""
    batch, usual, most = 64, 2000 if flow else 1200, 5000 if flow else 3000
    few = max(200, 200 * n_train // batch) if n_train > 0 else usual  # limits for a very small data set
    steps = _hundreds(min(max(min(usual, few), 15 * n_train // batch), most))
    many = summary is not None and summary.n_genes > MANY_GENES
    train = {
        "max_steps": steps,
        "feed": {"batch_size": batch, "micro_batch_size": batch // 2, "lanes": 4},
        "optimizer": {"lr": 3e-3 if flow else 2e-3, "warmup": 0.05, "decay": 0.4},
        "validate_every": steps // 4,
        "checkpoint_every": steps // 4,
    }
    if not flow:
        train["validation_cells"] = 128 if many else 512
        train["genes_seen"] = {"mode": "share_expressed", "share": 0.7}  # against overfitting
        train["first_weights"] = "components"
    return Chosen(train, f"{steps:,} steps of {batch} cells: {_passes(steps * batch, n_train)}")


def _gpu_workers(gpus: int, n_train: int) -> int:
    """Return how many of the GPUs train: as many as shorten the training with CELLS_PER_GPU cells of a step on each.

    A training takes at least GPU_STEPS steps. GPUs beyond PASSES times through the cells in that many steps would only
    enlarge its batches, and it would end no sooner. All of them if the number of cells is not known.
    """
    if n_train <= 0:
        return gpus
    return min(gpus, max(1, PASSES * n_train // (GPU_STEPS * CELLS_PER_GPU)))


def _machines(gpus: int, workers: int, n_train: int) -> str:
    if not gpus:
        return "CPU cores; --gpus N writes a job for GPUs"
    if workers == gpus:
        return f"{gpus} GPUs (--gpus), {CELLS_PER_GPU} or more cells of a step on each"
    trains = "one GPU trains" if workers == 1 else f"{workers} GPUs train"
    return (
        f"{gpus} GPUs (--gpus), of which {trains}: {n_train:,} cells would be passed through more often with more, in "
        f"no less time"
    )


def _gpu_steps(n_train: int, workers: int, *, flow: bool, summary: SourceSummary | None = None) -> Chosen:
    lanes = workers * math.ceil(4 / workers)
    batch = max(CELLS_PER_GPU * workers, 2048 if n_train >= 1_000_000 else 0)
    batch = lanes * math.ceil(batch / lanes)
    steps = _hundreds(min(max(GPU_STEPS, PASSES * n_train // batch), 150_000))
    optimizer: dict[str, Any] = {"decay": 0.1, "decay_type": "sqrt", "final_factor": 0.1}
    if flow:
        optimizer = {"lr": 5e-4, "betas": [0.9, 0.999], "decay": 0.9, "final_factor": 0.1}
    train = {
        "max_steps": steps,
        # A micro batch of 32 cells takes four times the kernel launches; `scldm plan` shows the memory of this one.
        "feed": {"batch_size": batch, "micro_batch_size": min(batch // workers, CELLS_PER_GPU), "lanes": lanes},
        "optimizer": optimizer,
        "precision": "bf16",
        "validate_every": max(500, steps // 50),
        "checkpoint_every": 1000,
    }
    return Chosen(train, f"{steps:,} steps of {batch} cells: {_passes(steps * batch, n_train)}")


def _quarter(train: Chosen) -> Chosen:
    """Return a training of a quarter of the steps: the learning rate follows them."""
    value = dict(train.value)
    for key in ("max_steps", "validate_every", "checkpoint_every"):
        value[key] = max(1, value[key] // QUICK)
    return Chosen(value, f"{value['max_steps']:,} steps, a quarter for a first look; in full {train.reason}")


def _n_generated(summary: SourceSummary, gpus: int) -> Chosen:
    most = 100_000 if gpus else 2000
    n = most if summary.kind == "Census" else min(most, summary.n_cells)
    return Chosen(n, "in the composition of the training cells")


def _passes(seen: int, n_train: int) -> str:
    if n_train <= 0:
        return "how many times through the training cells is not known before ingest"
    times = seen / n_train
    return f"{times:.0f} times through {n_train:,} training cells" if times >= 1.5 else (
        f"{times:.1f} of {n_train:,} training cells; give more steps, or GPUs (--gpus)")  # fmt: skip


def _hundreds(steps: float) -> int:
    """Round up to a multiple of 400, so that quarters are multiples of 100."""
    return 400 * math.ceil(steps / 400)
