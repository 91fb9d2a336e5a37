"""Render the job file that `scldm init` writes: YAML with the reason for every choice."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.cli.init.continued import Continued
from pipeline.cli.init.defaults import Choices
from pipeline.cli.init.inspect import SourceSummary
from pipeline.cli.init.labels import Labels
from scldm.text import shown

COLUMN = 2  # spaces before a comment
WIDE = 118


def job_text(summary: SourceSummary, labels: Labels, choices: Choices, *, name: str, source: Mapping[str, Any],
             cells: Mapping[str, Any], command: str, path: str, output: str = "runs",
             start: Continued | None = None) -> str:  # fmt: skip
    """Return the text of the job file.

    Args:
        source: ingest.source, without the columns that labels need.
        cells: ingest.cells.
        command: The command that writes it, for the header.
        path: Where it will be.
        output: Folder of all pipelines.
        start: What it trains on from; None: new networks.
    """
    lines = [
        *_head(summary, choices, command, path),
        "kind: pipeline",
        f"name: {_flow(name)}",
        f"output: {_flow(output)}",
        *_setting("resources", _resources(choices), choices.machines),
        "",
        *_ingest(summary, labels, choices, source, cells, start),
        "",
        *_train_vae(choices, start),
        "",
        *_encode(choices),
        "",
        "train_flow:",
        *_flow_model(choices, start),
        *_train(choices.flow_train.value, choices.flow_train.reason),
        "",
        "generate:",
        "  like: train",
        *_setting("  n_cells", choices.n_generated.value, choices.n_generated.reason),
        *_setting("  shard_size", choices.shard_size, "cells in a file"),
        "",
        "evaluate: {}",
    ]
    return "\n".join(lines) + "\n"


def _head(summary: SourceSummary, choices: Choices, command: str, path: str) -> list[str]:
    where = shown(summary.uri, 200)
    if summary.kind == "Census":
        size = "Nothing of it was looked at: no network is used."
    else:
        values = "counts not read" if summary.values_are is None else summary.values_are
        size = f"{summary.n_cells:,} cells x {summary.n_genes:,} genes, {values}."
    return [
        "#!/usr/bin/env -S python -m pipeline run",
        f"# The whole pipeline on {where}: ingest, train the VAE, encode, train the flow, generate, evaluate.",
        f"# {size}",
        f"# Written by: {shown(command, 300)}",
        f"# How large it is, and how long where a rate is known: scldm plan {shlex.quote(shown(path, 200))}",
        f"# Run: scldm run {shlex.quote(shown(path, 200))}        (settings: docs/configuration.md)",
    ]


def _resources(choices: Choices) -> dict[str, Any]:
    alone = {} if choices.ray else {"ray": False}
    if choices.gpus:
        gpus = {"cpus_per_worker": 8, "gpus_per_worker": 1, "actors": choices.gpus}
        return {**alone, "workers": choices.workers, **gpus}
    return {**alone, "workers": choices.workers, "cpus_per_worker": 1, "actors": choices.workers}


def _ingest(summary: SourceSummary, labels: Labels, choices: Choices, source: Mapping[str, Any],
            cells: Mapping[str, Any], start: Continued | None = None) -> list[str]:  # fmt: skip
    whole = {**source, **({"columns": dict(choices.columns)} if choices.columns else {})}
    lines = ["ingest:", f"  source: {_flow(whole)}"]
    if summary.other_places:
        lines.append(f"  # whole numbers are also at {shown(', '.join(summary.other_places), 100)}")
    lines += [f"  cells: {_flow(dict(cells))}"] if cells else []
    lines += _setting("  labels", list(choices.labels), _why_labels(labels))
    names = dict(zip(labels.columns, choices.labels, strict=True))
    if numbers := {names[c]: dict(given) for c, given in labels.numbers.items()}:
        lines += _setting("  label_values", numbers, "numbers by value: others than those of the data can be generated")
    lines += [f"  # left out: {shown(v.column)}: {v.reason}" for v in labels.verdicts if not v.taken][:30]
    if choices.missing_label == "drop":
        lines += _setting("  missing_label", "drop", f"at most {labels.drops:,} cells have no value of a label")
    if start is None:
        lines += _setting("  genes", {"min_cells": choices.min_cells.value}, choices.min_cells.reason)
    else:
        lines += _setting("  genes", start.genes, "those of the model that is trained on")
    lines += _setting("  split", choices.split.value, choices.split.reason)
    if summary.kind in ("Census", "SOMA"):
        lines += _setting("  cache", True, "cells are read over the network once, not in every epoch")
    return lines


def _why_labels(labels: Labels) -> str:
    if not labels.columns:
        return "no column was fit: the model generates cells without conditions"
    return "; ".join(f"{shown(c)}: {labels.reason.get(c, 'of every Census release')}" for c in labels.columns)


def _train_vae(choices: Choices, start: Continued | None) -> list[str]:
    if start is not None and start.keep_vae:
        return _setting("train_vae", {"model": str(start.vae), "train": False}, "used as it is")
    model = _setting("  model", choices.vae.value, choices.vae.reason)
    if start is not None:
        model = _setting("  start_from", start.vae_start, "sizes and first weights are its own")
    return [
        "train_vae:",
        *model,
        *_train(
            {**choices.vae_train.value, "genes_per_step": choices.genes_per_step.value},
            choices.vae_train.reason,
            genes_per_step=choices.genes_per_step.reason,
        ),
    ]


def _flow_model(choices: Choices, start: Continued | None) -> list[str]:
    if start is None or start.flow_start is None:
        return _setting("  model", choices.flow.value, choices.flow.reason)
    return _setting("  start_from", start.flow_start, "sizes and first weights are its own")


def _encode(choices: Choices) -> list[str]:
    if not choices.gpus:
        return ["encode: {}"]
    return ["encode:", *_setting("  latents", "float16", "half the disk; rounds each number by at most 0.05 %")]


def _train(train: Mapping[str, Any], reason: str, **reasons: str) -> list[str]:
    reasons = {"max_steps": reason, "feed": "batch_size: cells of a step, over all workers", **reasons}
    lines = ["  train:"]
    for key, value in train.items():
        lines += _setting(f"    {key}", value, reasons.get(key, ""))
    return lines


def _setting(key: str, value: Any, reason: str) -> list[str]:
    """Return `key: value  # reason`, with the reason on a line above if that would be too long."""
    line = f"{key}: {_flow(value)}"
    if not reason:
        return [line]
    if len(line) + COLUMN + 2 + len(reason) <= WIDE:
        return [f"{line}{' ' * COLUMN}# {reason}"]
    indent = key[: len(key) - len(key.lstrip())]
    return [f"{indent}# {reason}", line]


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} cannot stand in a job file")
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=False)
    return text.removesuffix("\n").removesuffix("\n...")


class _Dumper(yaml.SafeDumper):
    """A dumper that writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
