"""Two or more lines of stages side by side: settings that differ, scores with their floors, where each came from.

The best is the one nearest to *its own* floor (`scldm.metrics.score.departure`): the floor is real cells against real
cells, and lines that were scored on other cells have other floors. A score without a floor (a training loss) is shown
and not judged, because the loss of a flow depends on the latents that it was trained on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.tracking.comparison.records import Measured, StageRecord

KEY_METRICS = (
    *("w2", "mmd2", "frechet", "energy", "auroc", "gene_mean_r2", "gene_variance_r2", "zero_fraction_difference"),
    *("library_size_ks", "genes_per_cell_ks", "reconstruction_nll", "reconstruction_gene_pearson"),
)
KEY_PREFIXES = ("label_accuracy.",)
TIE = 1e-9


@dataclass(frozen=True)
class Side:
    """One of the things compared."""

    name: str  # as it was asked for
    line: Sequence[StageRecord]

    @property
    def evaluation(self) -> StageRecord | None:
        return next((r for r in self.line if r.stage == "evaluate"), None)

    def params(self) -> dict[str, str]:
        return {f"{r.stage}.{k}": v for r in self.line for k, v in r.params.items()}

    def lineage(self) -> dict[str, str]:
        """What it was made from, in words."""
        found: dict[str, str] = {}
        for record in self.line:
            found |= {k: v[:12] for k, v in record.about.items()}
        found |= {record.stage: record.version for record in self.line}
        newest = max((r.finished_at for r in self.line), default=0.0)
        return found | ({"finished": time.strftime("%Y-%m-%d %H:%M", time.localtime(newest))} if newest else {})


@dataclass(frozen=True)
class MetricRow:
    """One score of every side; None where a side has none."""

    name: str
    better: str | None
    ideal: float | None
    values: list[float | None]
    floors: list[float | None]
    best: list[int]  # sides nearest to their floor; several where they tie, none where there is nothing to judge


@dataclass(frozen=True)
class Comparison:
    sides: list[str]
    lineage: dict[str, list[str | None]]
    params: dict[str, list[str | None]]  # those that differ
    metrics: list[MetricRow]
    training: list[MetricRow]
    notes: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def compare(sides: Sequence[Side], *, every: bool = False) -> Comparison:
    """Lay sides side by side.

    Args:
        every: All scores, not the key ones alone.
    """
    lineage = _beside([s.lineage() for s in sides])
    scored = [_scores(s) for s in sides]
    names = list(dict.fromkeys(k for of in scored for k in of))
    key = [k for k in KEY_METRICS if k in names] + [k for k in names if k.startswith(KEY_PREFIXES)]
    training = [_training(s) for s in sides]
    return Comparison(
        sides=[s.name for s in sides],
        lineage=lineage,
        params={k: v for k, v in _beside([s.params() for s in sides]).items() if len(set(v)) > 1},
        metrics=[_row(k, scored) for k in (names if every or not key else key)],
        training=[_row(k, training) for k in dict.fromkeys(k for of in training for k in of)],
        notes=list(_notes(sides, lineage)),
    )


def _scores(side: Side) -> dict[str, Measured]:
    return dict(side.evaluation.metrics) if side.evaluation is not None else {}


def _training(side: Side) -> dict[str, Measured]:
    return {f"{r.stage} {k}": m for r in side.line if r.stage != "evaluate" for k, m in r.metrics.items()}


def _row(name: str, sides: Sequence[dict[str, Measured]]) -> MetricRow:
    found = [of.get(name) for of in sides]
    away = [departure(m) for m in found]
    judged = [a for a in away if a is not None]
    nearest = min(judged) if len(judged) > 1 else None
    some = next((m for m in found if m is not None and m.better), None)
    return MetricRow(
        name=name,
        better=some.better if some else None,
        ideal=some.ideal if some else None,
        values=[None if m is None else m.value for m in found],
        floors=[None if m is None else m.floor for m in found],
        best=[i for i, a in enumerate(away) if a is not None and nearest is not None and a <= nearest + TIE],
    )


def departure(measured: Measured | None) -> float | None:
    """|value - floor|, as `scldm.metrics.score.departure`, which a light command cannot import; None without both."""
    if measured is None or measured.floor is None or not math.isfinite(measured.value):
        return None
    return abs(measured.value - measured.floor)


def _beside(maps: Sequence[dict[str, str]]) -> dict[str, list[str | None]]:
    return {k: [m.get(k) for m in maps] for k in dict.fromkeys(k for m in maps for k in m)}


def _notes(sides: Sequence[Side], lineage: dict[str, list[str | None]]) -> Any:
    digests = lineage.get("data_digest", [])
    if len(set(digests)) > 1:
        yield "The sides were scored on other cells (data_digest differs): compare distances to the floor, not values."
    elif len(set(lineage.get("evaluate", []))) > 1 and (asked := _asked(sides)):
        yield f"The sides were scored with other settings ({', '.join(asked)}): values and floors may not compare."
    for side in (s for s in sides if s.evaluation is None):
        made = ", ".join(r.stage for r in side.line)
        yield f"{side.name} has no evaluation (it has: {made}); run jobs/evaluate.yaml with its folders as inputs."


def _asked(sides: Sequence[Side]) -> list[str]:
    """Settings of evaluate that differ."""
    params = _beside([dict(s.evaluation.params) if s.evaluation is not None else {} for s in sides])
    return [k for k, v in params.items() if len(set(v)) > 1]
