"""The report: one HTML file that needs no network, with pictures inline and everything that came from data escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from scldm.metrics.compare import Score, departure

MAX_BYTES = 5_000_000
GROUPS = {
    "reconstruction": "Reconstruction of held-out real cells (VAE)",
    "label": "Labels: does a cell carry the condition that it was asked for?",
    "distance": "Distances in the PCA space fitted on real",
    "two-sample": "Can generated be told from real?",
    "expression": "Genes (log1p CP10k)",
    "cells": "Cells",
}


@dataclass(frozen=True)
class MetricRow:
    """One line of the table."""

    name: str
    score: Score
    floor: Score | None = None
    baselines: Mapping[str, Score] = field(default_factory=dict)

    @property
    def position(self) -> float | None:
        """0 at the floor, 1 as far from it as the first baseline; None where that scale does not exist."""
        if self.floor is None or not self.baselines:
            return None
        scale = departure(next(iter(self.baselines.values())), self.floor)
        return departure(self.score, self.floor) / scale if scale > 0 else None

    @property
    def nearer(self) -> bool | None:
        """At least as near to the floor as the first baseline; None where there is nothing to compare."""
        if self.floor is None or not self.baselines:
            return None
        return departure(self.score, self.floor) <= departure(next(iter(self.baselines.values())), self.floor)

    @property
    def hint(self) -> str:
        ideal = f"{self.score.ideal:g}"
        return {"lower": "↓ lower", "higher": "↑ higher", "ideal": f"→ near {ideal}"}[self.score.better]


@dataclass(frozen=True)
class Picture:
    name: str  # file name without ending
    title: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class ReportInputs:
    title: str
    verdict: str
    notes: Sequence[str]  # what a reader must know before believing the numbers
    facts: Mapping[str, str]  # numbers of cells, seeds, settings
    rows: Sequence[MetricRow]
    baseline_names: Sequence[str]  # columns, the first one is the yardstick
    pictures: Sequence[Picture]
    provenance: Sequence[Mapping[str, Any]]  # one per stage: stage, version, config, …
    reproduce: str


def render(inputs: ReportInputs) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, base64=lambda b: base64.b64encode(b).decode(), pretty=_pretty)
    groups = {title: [r for r in inputs.rows if r.score.group == key] for key, title in GROUPS.items()}
    return environment.get_template("report.html.jinja").render(
        inputs=inputs, groups={title: rows for title, rows in groups.items() if rows}
    )


def write_report(path: Path, inputs: ReportInputs) -> None:
    """Write the file.

    Raises:
        ValueError: if it would exceed MAX_BYTES, with the size of each picture.
    """
    data = render(inputs).encode()
    if len(data) > MAX_BYTES:
        sizes = ", ".join(f"{p.name} {len(p.png):,}" for p in inputs.pictures)
        raise ValueError(f"the report has {len(data):,} bytes, at most {MAX_BYTES:,} are allowed; pictures: {sizes}")
    path.write_bytes(data)


def _number(value: float) -> str:
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, default=str, ensure_ascii=False)
