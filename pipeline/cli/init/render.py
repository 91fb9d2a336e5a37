"""The job file that `scldm init` writes: YAML with the reason beside every choice. What is written validates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.cli.init.defaults import Choices
from pipeline.cli.init.inspect import Looked
from pipeline.cli.init.labels import Labels
from scldm.text import shown

COLUMN = 2  # spaces before a comment
WIDE = 118


def job_text(looked: Looked, labels: Labels, choices: Choices, *, name: str, source: Mapping[str, Any],
             cells: Mapping[str, Any], command: str, path: str) -> str:  # fmt: skip
    """The whole file.

    Args:
        source: ingest.source, without the columns that labels need.
        cells: ingest.cells.
        command: The command that writes it, for people.
        path: Where it will be.
    """
    lines = [
        *_head(looked, choices, command, path),
        "kind: pipeline",
        f"name: {_flow(name)}",
        "output: runs",
        *_setting("resources", _resources(choices), _machines(choices)),
        "",
        *_ingest(looked, labels, choices, source, cells),
        "",
        *_train_vae(choices),
        "",
        "encode: {}",
        "",
        "train_flow:",
        *_setting("  model", choices.flow.value, choices.flow.why),
        *_train(choices.flow_train.value, choices.flow_train.why),
        "",
        "generate:",
        "  like: train",
        *_setting("  n_cells", choices.n_generated.value, choices.n_generated.why),
        *_setting("  shard_size", choices.shard_size, "cells in a file"),
        "",
        "evaluate: {}",
    ]
    return "\n".join(lines) + "\n"


def _head(looked: Looked, choices: Choices, command: str, path: str) -> list[str]:
    where = shown(looked.uri, 200)
    if looked.kind == "Census":
        size = "Nothing of it was looked at: no network is used."
    else:
        values = "counts not read" if looked.values_are is None else looked.values_are
        size = f"{looked.n_cells:,} cells x {looked.n_genes:,} genes, {values}."
    return [
        "#!/usr/bin/env -S python -m pipeline run",
        f"# The whole line on {where}: ingest, train the VAE, encode, train the flow, generate, evaluate.",
        f"# {size}",
        f"# Written by: {shown(command, 300)}",
        f"# How large it is, and how long where a rate is known: scldm plan {shown(path, 200)}",
        f"# Run: scldm run {shown(path, 200)}        (settings: docs/configuration.md)",
    ]


def _resources(choices: Choices) -> dict[str, Any]:
    if choices.gpus:
        return {"workers": choices.workers, "cpus_per_worker": 8, "gpus_per_worker": 1, "actors": choices.workers}
    return {"workers": choices.workers, "cpus_per_worker": 1, "actors": choices.workers}


def _machines(choices: Choices) -> str:
    return f"{choices.gpus} GPUs (--gpus)" if choices.gpus else "CPU cores; --gpus N writes a job for GPUs"


def _ingest(looked: Looked, labels: Labels, choices: Choices, source: Mapping[str, Any],
            cells: Mapping[str, Any]) -> list[str]:  # fmt: skip
    whole = {**source, **({"columns": dict(choices.columns)} if choices.columns else {})}
    lines = ["ingest:", f"  source: {_flow(whole)}"]
    if looked.other_places:
        lines.append(f"  # whole numbers are also at {shown(', '.join(looked.other_places), 100)}")
    lines += [f"  cells: {_flow(dict(cells))}"] if cells else []
    lines += _setting("  labels", list(choices.labels), _why_labels(labels))
    lines += [f"  # left out: {shown(v.column)}: {v.why}" for v in labels.verdicts if not v.taken][:30]
    if choices.missing_label == "drop":
        lines += _setting("  missing_label", "drop", f"at most {labels.drops:,} cells have no value of a label")
    lines += _setting("  genes", {"min_cells": choices.min_cells.value}, choices.min_cells.why)
    lines += _setting("  split", choices.split.value, choices.split.why)
    if looked.kind in ("Census", "SOMA"):
        lines += _setting("  cache", True, "cells are read over the network once, not in every epoch")
    return lines


def _why_labels(labels: Labels) -> str:
    if not labels.columns:
        return "no column was fit: the model generates cells without conditions"
    return "; ".join(f"{shown(c)}: {labels.why.get(c, 'of every Census release')}" for c in labels.columns)


def _train_vae(choices: Choices) -> list[str]:
    return [
        "train_vae:",
        *_setting("  model", choices.vae.value, choices.vae.why),
        *_train(
            {**choices.vae_train.value, "genes_per_step": choices.genes_per_step.value},
            choices.vae_train.why,
            genes_per_step=choices.genes_per_step.why,
        ),
    ]


def _train(train: Mapping[str, Any], why: str, **reasons: str) -> list[str]:
    reasons = {"max_steps": why, "feed": "batch_size: cells of a step, over all workers", **reasons}
    lines = ["  train:"]
    for key, value in train.items():
        lines += _setting(f"    {key}", value, reasons.get(key, ""))
    return lines


def _setting(key: str, value: Any, why: str) -> list[str]:
    """`key: value  # why`, or the reason above it where the line would be too long."""
    line = f"{key}: {_flow(value)}"
    if not why:
        return [line]
    if len(line) + COLUMN + 2 + len(why) <= WIDE:
        return [f"{line}{' ' * COLUMN}# {why}"]
    indent = key[: len(key) - len(key.lstrip())]
    return [f"{indent}# {why}", line]


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} cannot stand in a job file")
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=False)
    return text.removesuffix("\n").removesuffix("\n...")


class _Dumper(yaml.SafeDumper):
    """Writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
