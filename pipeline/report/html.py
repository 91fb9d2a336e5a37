"""Write the report: one HTML file that needs no network, with inline pictures and all text from data escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.report.bars import bar_svg, colors
from pipeline.report.rows import MetricRow
from scldm.metrics.score import Score

MAX_BYTES = 5_000_000
MAX_CLASS_ROWS = 60  # label_recall rows; a label with thousands of classes would bury the table
GROUPS = {
    "distance": "Distances in the PCA space fitted on real",
    "two-sample": "Can generated be told from real?",
    "conditional": "Within classes: means over the classes",
    "label": "Labels: does a cell have the requested condition?",
    "expression": "Genes (log1p CP10k)",
    "cells": "Cells",
    "streamed": "All generated cells, streamed and weighted to the held-out composition",
    "memorisation": "Copies: is a generated cell nearer to a training cell than a held-out real one is?",
    "reconstruction": "Reconstruction of held-out real cells (VAE)",
}


@dataclass(frozen=True)
class Picture:
    """A picture of the report."""

    name: str  # file name without ending
    title: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class ReportInputs:
    """All that the report shows."""

    title: str
    verdict: str
    notes: Sequence[str]  # what a reader must know to trust the numbers
    facts: Mapping[str, str]  # numbers of cells, seeds, settings
    rows: Sequence[MetricRow]
    baseline_names: Sequence[str]  # further columns after generated and floor
    yardstick: str  # the column that rows are judged against; "" for none
    pictures: Sequence[Picture]
    provenance: Sequence[Mapping[str, Any]]  # one per stage: stage, version, config, …
    reproduce: str
    combinations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # answer -> title of a score


def page_environment() -> jinja2.Environment:
    """Return what pages are made with: the templates of this folder, all text of data escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(inputs: ReportInputs) -> str:
    """Return the HTML."""
    environment = page_environment()
    palette = colors(list(inputs.baseline_names))
    environment.filters.update(
        number=number, width=width, base64=lambda b: base64.b64encode(b).decode(), pretty=_pretty,
        bars=lambda row: Markup(bar_svg(row.all, palette)),  # numbers and colors only
    )  # fmt: skip
    groups = {title: [r for r in inputs.rows if r.score.group == key] for key, title in GROUPS.items()}
    groups = {title: _without_many_classes(rows) for title, rows in groups.items() if rows}
    hidden = len(inputs.rows) - sum(map(len, groups.values()))
    return environment.get_template("report.html.jinja").render(
        inputs=inputs, groups=groups, palette=palette, hidden=hidden
    )


def _without_many_classes(rows: Sequence[MetricRow]) -> list[MetricRow]:
    classes = [row.name for row in rows if row.name.startswith("label_recall.")]
    cut = set(classes[MAX_CLASS_ROWS:])
    return [row for row in rows if row.name not in cut]


def write_report(path: Path, inputs: ReportInputs) -> None:
    """Write the report to a file.

    Raises:
        ValueError: It would exceed MAX_BYTES; the message tells the size of each picture.
    """
    data = render(inputs).encode()
    if len(data) > MAX_BYTES:
        sizes = ", ".join(f"{p.name} {len(p.png):,}" for p in inputs.pictures)
        raise ValueError(f"the report has {len(data):,} bytes, at most {MAX_BYTES:,} are allowed; pictures: {sizes}")
    path.write_bytes(data)


def number(value: float) -> str:
    """Format a score with about four significant digits."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def width(score: Score) -> str:
    """Format half of the interval; "" if there is none."""
    return "" if score.half_width is None else f"± {number(score.half_width)}"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, default=str, ensure_ascii=False)
