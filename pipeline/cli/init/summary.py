"""The summary that `scldm init` prints: what it found, what it chose and why, what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path

from pipeline.cli.init.defaults import Choices
from pipeline.cli.init.inspect import SourceSummary
from pipeline.cli.init.labels import Labels
from scldm.text import shown


def summary_text(summary: SourceSummary, labels: Labels, choices: Choices, path: Path) -> str:
    """Return what was found, what was chosen and why, and what to do next."""
    rows = [("counts", *_counts(summary)), ("genes", *_genes(summary))]
    rows += [("label", shown(v.column), v.reason) for v in labels.verdicts if v.taken]
    rows += [("left out", shown(v.column), v.reason) for v in labels.verdicts if not v.taken]
    if not labels.columns:
        rows.append(("label", "none", "no column was fit: the model generates cells without conditions"))
    if choices.missing_label == "drop":
        rows.append(("left out", f"{labels.drops:,} cells", "they have no value of a label (missing_label: drop)"))
    rows += [
        ("split", f"by {choices.split.value['by']}", choices.split.reason),
        ("min_cells", str(choices.min_cells.value), choices.min_cells.reason),
        ("trains on", f"{choices.workers} {'GPUs' if choices.gpus else 'processes'}", choices.machines),
        ("VAE", f"width {choices.vae.value['d_model']}", choices.vae.reason),
        ("", f"genes_per_step {choices.genes_per_step.value or 'all'}", choices.genes_per_step.reason),
        ("", "steps", choices.vae_train.reason),
        ("flow", f"width {choices.flow.value['d_model']}", choices.flow.reason),
        ("", "steps", choices.flow_train.reason),
        ("generate", f"{choices.n_generated.value:,} cells", choices.n_generated.reason),
    ]
    a, b = max(len(r[0]) for r in rows), min(32, max(len(r[1]) for r in rows))
    lines = [f"{r[0]:<{a}}  {r[1]:<{b}}  {r[2]}" for r in rows]
    notes = [w for w in summary.warnings if not (choices.min_cells.value and "genes are in no cell" in w)]
    lines += [f"note: {w.removeprefix('warning: ')}" for w in notes[:12]]
    where = shlex.quote(str(path))
    return "\n".join([*lines, f"wrote {path}; next:", f"  scldm plan {where}", f"  scldm run {where}"])


def _counts(summary: SourceSummary) -> tuple[str, str]:
    if summary.kind == "Census":
        return "Census", "raw counts of every release; nothing was looked at"
    place = (
        {None: "X", "raw": "raw"}.get(summary.layer, f"layer {shown(summary.layer)}")
        if summary.kind == "h5ad"
        else "as is"
    )
    many = f" in {summary.n_files} files" if summary.n_files > 1 else ""
    said = (
        "not read (--no-counts)" if summary.values_are is None else f"{summary.values_are}, {summary.n_stored:,} stored"
    )
    return place, f"{summary.n_cells:,} cells x {summary.n_genes:,} genes{many}; {said}"


def _genes(summary: SourceSummary) -> tuple[str, str]:
    if summary.kind != "h5ad":
        return "as is", "the source names them by id"
    if summary.gene_id is not None:
        return f"var {shown(summary.gene_id)}", "ids, each once; models and files are matched by them"
    return "var index", "no column of var holds Ensembl ids, each once" if summary.gene_name is None else (
        f"ids; names in {shown(summary.gene_name)}")  # fmt: skip
