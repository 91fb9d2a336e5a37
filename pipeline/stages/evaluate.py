"""Stage `evaluate`: generated cells against held-out real ones; writes the report, the numbers and the pictures.

Reads the manifests of ingest, train_vae and generate. The scores are made in memory by `pipeline.report.evaluation`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
import torch
from anndata import AnnData
from rich.console import Console
from rich.table import Table

from pipeline.data.ingested import Ingested
from pipeline.job import EvaluateConfig
from pipeline.report.evaluation import POISSON, Decoded, Evaluation, evaluate
from pipeline.report.gallery import gallery
from pipeline.report.html import Picture, ReportInputs, write_report
from pipeline.stage import InputError, Manifest, StageContext, write_json_atomic
from scldm.batch import CellBatch
from scldm.checkpoints.native import LoadedVAE, load_vae
from scldm.metrics.expression import as_counts

VAE_BATCH = 64  # cells
KEY_FIGURES = {
    *("reconstruction_nll", "reconstruction_gene_pearson", "gene_mean_r2", "gene_variance_r2", "frechet", "mmd2", "w2"),
    *("auroc", "zero_fraction_difference", "library_size_ks", "genes_per_cell_ks"),
}

NO_LABEL = "cells"  # stands for the label where a model has none


def _vae_that_made_the_cells(inputs: Mapping[str, Manifest]) -> Path:
    """That of train_vae, or the one that was trained on together with the flow."""
    generated = inputs["generate"]
    return generated.path("vae") if "vae" in generated.facts else inputs["train_vae"].path("model")


def run(config: EvaluateConfig, context: StageContext) -> dict[str, Any]:
    """Evaluate, write report.html, metrics.json, metrics.csv and figures/*.png, and return the facts."""
    inputs = context.inputs
    ingested = Ingested.open(inputs["ingest"])
    held_out = ingested.anndata(config.split, max_cells=config.max_cells, seed=config.seed)
    if not held_out.n_obs:
        raise InputError(f"the {config.split} split holds no cells; set evaluate.split, or ingest.split.{config.split}")
    n_training = config.max_cells + held_out.n_obs
    training = ingested.anndata("train", max_cells=n_training, seed=config.seed)
    generated = read_generated(inputs["generate"], max_cells=config.max_cells, rng=np.random.default_rng(config.seed))
    loaded = load_vae(_vae_that_made_the_cells(inputs))
    labels = [label.name for label in loaded.vocabulary.labels]
    if not labels:  # a model without conditions: all cells are of one kind, which the baselines are then fitted to
        labels = [NO_LABEL]
        for adata in (held_out, training, generated):
            adata.obs[NO_LABEL] = "all"
    known = ingested.measured_by(held_out.obs_names.astype(np.int64).to_numpy())
    decoded = decode_cells(loaded, held_out, n_cells=config.reconstruction_cells, measured=known)
    result = evaluate(
        held_out=held_out, training=training, generated=generated, labels=labels, config=config, decoded=decoded
    )
    pictures = list(gallery(result, config, training_records(inputs)))
    write_outputs(context.folder, result, pictures, inputs=inputs, config=config)
    values = {name: row.value for name, row in result.generated.items()}
    context.tracker.metrics({f"eval/{metric_key(k)}": v for k, v in values.items()}, step=0)
    context.tracker.metrics({f"eval/{metric_key(k)}_floor": s.value for k, s in result.floor.items()}, step=0)
    for path in (context.folder / "report.html", context.folder / "metrics.json"):
        context.tracker.artifact(path)
    for picture in pictures:
        context.tracker.artifact(context.folder / "figures" / f"{picture.name}.png", folder="figures")
    print_key_figures(result, Console())
    return {
        "report": "report.html",
        "metrics": values,
        "floor": {name: score.value for name, score in result.floor.items()},
        "baseline": {name: score.value for name, score in result.baselines[POISSON].items()},
        "verdict": result.verdict,
    }


def metric_key(name: str) -> str:
    """A name that MLflow accepts: class names may hold anything."""
    return re.sub(r"[^\w\-. /]", "_", name)


def read_generated(manifest: Manifest, *, max_cells: int, rng: np.random.Generator) -> AnnData:
    """At most so many generated cells, drawn without replacement from all committed shards."""
    sizes = [shard["n_cells"] for shard in manifest.facts["shards"]]
    total = sum(sizes)
    rows = np.sort(rng.choice(total, min(max_cells, total), replace=False))
    starts = np.cumsum([0, *sizes])
    parts = []
    for shard, low, high in zip(manifest.facts["shards"], starts[:-1], starts[1:], strict=True):
        inside = rows[(rows >= low) & (rows < high)] - low
        if len(inside):
            file = anndata.read_h5ad(Path(manifest.folder) / shard["file"], backed="r")
            parts.append(file[inside].to_memory())
            file.file.close()
    if not parts:
        raise InputError(f"{manifest.folder} holds no generated cells")
    return anndata.concat(parts, merge="same") if len(parts) > 1 else parts[0]


def cell_batch(counts: sp.csr_matrix) -> CellBatch:
    """Unconditioned cells as the VAE takes them."""
    n = counts.shape[0]
    return CellBatch(
        offsets=torch.from_numpy(counts.indptr.astype(np.int64)),
        gene_ids=torch.from_numpy(counts.indices.astype(np.int64)),
        counts=torch.from_numpy(counts.data.astype(np.float32)),
        library_size=torch.from_numpy(np.asarray(counts.sum(1)).ravel().astype(np.float32)),
        conditions={},
        joinids=torch.arange(n),
        weight=torch.ones(n),
    )


@torch.inference_mode()
def decode_cells(loaded: LoadedVAE, cells: AnnData, *, n_cells: int, measured: np.ndarray | None = None) -> Decoded:
    """Encode and decode the first cells that have counts (held-out cells come in random order).

    Args:
        measured: Genes that were measured in each cell, bool (n, g); all if None.
    """
    counts = as_counts(cells.X)
    rows = np.flatnonzero(np.diff(counts.indptr))[:n_cells]
    mu, nll = [], []
    for start in range(0, len(rows), VAE_BATCH):
        chosen = rows[start : start + VAE_BATCH]
        batch = cell_batch(counts[chosen])
        if measured is not None:
            batch = replace(batch, measured=torch.from_numpy(measured[chosen]))
        z = loaded.vae.encode(batch)
        mu.append(loaded.vae.decode_mu(z, batch.library_size, measured=batch.measured).float().numpy())
        nll.append(loaded.vae.nll(batch, z).double().numpy())
    return Decoded(rows, np.concatenate(mu), np.concatenate(nll))


def training_records(inputs: Mapping[str, Manifest]) -> dict[str, list[dict[str, float]]]:
    """Lines of metrics.jsonl of the training stages that wrote one."""
    files = {s: Path(inputs[s].folder) / "metrics.jsonl" for s in ("train_vae", "train_flow") if s in inputs}
    return {s: [json.loads(line) for line in f.read_text().splitlines()] for s, f in files.items() if f.is_file()}


def write_outputs(
    folder: Path,
    result: Evaluation,
    pictures: list[Picture],
    *,
    inputs: Mapping[str, Manifest],
    config: EvaluateConfig,
) -> None:
    """metrics.json, metrics.csv, figures/*.png, report.html."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / "figures" / f"{picture.name}.png").write_bytes(picture.png)
    table = [
        {
            "metric": row.name,
            "better": row.score.better,
            "ideal": row.score.ideal,
            "generated": row.score.value,
            "floor": row.floor.value if row.floor else None,
            **{name: s.value for name, s in row.baselines.items()},
            "nearer_to_floor": row.nearer,
        }
        for row in result.rows
    ]
    summary = {"verdict": result.verdict, "notes": result.notes, "facts": result.facts, "rows": table}
    write_json_atomic(folder / "metrics.json", summary)
    names = list(dict.fromkeys(key for row in table for key in row))
    with (folder / "metrics.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=names)
        writer.writeheader()
        writer.writerows(table)
    report = ReportInputs(
        title="scLDM evaluation",
        verdict=result.verdict,
        notes=result.notes,
        facts=result.facts,
        rows=result.rows,
        baseline_names=list(result.baselines),
        pictures=pictures,
        provenance=[_provenance(m) for m in inputs.values()],
        reproduce=_reproduce(config, inputs),
    )
    write_report(folder / "report.html", report)


def _provenance(manifest: Manifest) -> dict[str, Any]:
    return {
        "stage": manifest.stage,
        "version": manifest.version,
        "seconds": f"{manifest.seconds:.1f}",
        "finished": f"{datetime.fromtimestamp(manifest.finished_at, UTC):%Y-%m-%d %H:%M:%S} UTC",
        "detail": {"config": manifest.config, "inputs": manifest.inputs, "folder": manifest.folder},
    }


def _reproduce(config: EvaluateConfig, inputs: Mapping[str, Manifest]) -> str:
    settings = " ".join(f"{k}={json.dumps(v)}" for k, v in config.model_dump(mode="json").items())
    folders = " ".join(f"inputs.{stage}={m.folder}" for stage, m in inputs.items())
    return f"scldm run jobs/evaluate.yaml {settings} {folders}"


def print_key_figures(result: Evaluation, console: Console) -> None:
    """A short table for the terminal."""
    table = Table(title="Generated against held-out real cells")
    table.add_column("metric")
    for column in ("generated", "floor", *result.baselines):
        table.add_column(column, justify="right")
    for row in result.rows:
        if row.name in KEY_FIGURES or row.name.startswith("label_accuracy."):
            others = [row.floor, *(row.baselines.get(name) for name in result.baselines)]
            table.add_row(row.score.title, *("–" if s is None else f"{s.value:.4g}" for s in (row.score, *others)))
    console.print(table)
    console.print(result.verdict)
