"""Compare two or more pipelines: settings that differ, scores with their floors, and the origin of each.

The best is the one nearest to *its own* floor (`scldm.metrics.score.departure`): the floor is real cells against real
cells, and pipelines that were scored on other cells have other floors. A score without a floor (a training loss) is
shown and not judged, because the loss of a flow depends on the latents that it was trained on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from pipeline.tracking.comparison.records import Measured, StageRecord
from scldm.metrics.score import KEY_PREFIXES, KEY_SCORES

TIE = 1e-9


@dataclass(frozen=True)
class ComparedRun:
    """One of the pipelines that are compared."""

    name: str  # as the user gave it
    stages: Sequence[StageRecord]

    @property
    def evaluation(self) -> StageRecord | None:
        """Its evaluation, if it has one."""
        return next((r for r in self.stages if r.stage == "evaluate"), None)

    def params(self) -> dict[str, str]:
        """Return the settings of all stages, `<stage>.<setting>`."""
        return {f"{r.stage}.{k}": v for r in self.stages for k, v in r.params.items()}

    def lineage(self) -> dict[str, str]:
        """Return the versions of its stages and of its data."""
        found: dict[str, str] = {}
        for record in self.stages:
            found |= {k: v[:12] for k, v in record.about.items()}
        found |= {record.stage: record.version for record in self.stages}
        newest = max((r.finished_at for r in self.stages), default=0.0)
        return found | ({"finished": time.strftime("%Y-%m-%d %H:%M", time.localtime(newest))} if newest else {})


@dataclass(frozen=True)
class MetricRow:
    """One score of every side; None where a side has none."""

    name: str
    better: str | None
    ideal: float | None
    values: list[float | None]
    floors: list[float | None]
    best: list[int]  # sides nearest to their floor; several if they tie, none if fewer than two have one


@dataclass(frozen=True)
class RunComparison:
    """The result, with one value per side in every list."""

    sides: list[str]
    lineage: dict[str, list[str | None]]
    params: dict[str, list[str | None]]  # those that differ
    metrics: list[MetricRow]
    training: list[MetricRow]
    notes: list[str]

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1)


def compare(sides: Sequence[ComparedRun], *, every: bool = False) -> RunComparison:
    """Compare sides.

    Args:
        every: Compare all scores instead of the key ones.
    """
    lineage = _side_by_side([s.lineage() for s in sides])
    scored = [_scores(s) for s in sides]
    names = list(dict.fromkeys(k for scores in scored for k in scores))
    key = [k for k in KEY_SCORES if k in names] + [k for k in names if k.startswith(KEY_PREFIXES)]
    training = [_training(s) for s in sides]
    return RunComparison(
        sides=[s.name for s in sides],
        lineage=lineage,
        params={k: v for k, v in _side_by_side([s.params() for s in sides]).items() if len(set(v)) > 1},
        metrics=[_row(k, scored) for k in (names if every or not key else key)],
        training=[_row(k, training) for k in dict.fromkeys(k for losses in training for k in losses)],
        notes=list(_notes(sides, lineage)),
    )


def _scores(side: ComparedRun) -> dict[str, Measured]:
    return dict(side.evaluation.metrics) if side.evaluation is not None else {}


def _training(side: ComparedRun) -> dict[str, Measured]:
    return {f"{r.stage} {k}": m for r in side.stages if r.stage != "evaluate" for k, m in r.metrics.items()}


def _row(name: str, sides: Sequence[dict[str, Measured]]) -> MetricRow:
    found = [scores.get(name) for scores in sides]
    distances = [departure(m) for m in found]
    judged = [d for d in distances if d is not None]
    nearest = min(judged) if len(judged) > 1 else None
    some = next((m for m in found if m is not None and m.better), None)
    return MetricRow(
        name=name,
        better=some.better if some else None,
        ideal=some.ideal if some else None,
        values=[None if m is None else m.value for m in found],
        floors=[None if m is None else m.floor for m in found],
        best=[i for i, d in enumerate(distances) if d is not None and nearest is not None and d <= nearest + TIE],
    )


def departure(measured: Measured | None) -> float | None:
    """Return |value - floor|, or None if one of them is missing.

    It is `scldm.metrics.score.departure`, which brings numpy and so is not imported by a light command.
    """
    if measured is None or measured.floor is None or not math.isfinite(measured.value):
        return None
    return abs(measured.value - measured.floor)


def _side_by_side(maps: Sequence[dict[str, str]]) -> dict[str, list[str | None]]:
    return {k: [m.get(k) for m in maps] for k in dict.fromkeys(k for m in maps for k in m)}


def _notes(sides: Sequence[ComparedRun], lineage: dict[str, list[str | None]]) -> Iterator[str]:
    digests = lineage.get("data_digest", [])
    if len(set(digests)) > 1:
        yield "The sides were scored on other cells (data_digest differs): compare distances to the floor, not values."
    elif len(set(lineage.get("evaluate", []))) > 1 and (changed := _evaluation_settings(sides)):
        yield f"The sides were scored with other settings ({', '.join(changed)}): values and floors may not compare."
    for side in (s for s in sides if s.evaluation is None):
        stages = ", ".join(r.stage for r in side.stages)
        yield f"{side.name} has no evaluation (it has: {stages}); run jobs/evaluate.yaml with its folders as inputs."


def _evaluation_settings(sides: Sequence[ComparedRun]) -> list[str]:
    """Return the settings of evaluate that differ."""
    params = _side_by_side([dict(s.evaluation.params) if s.evaluation is not None else {} for s in sides])
    return [k for k, v in params.items() if len(set(v)) > 1]
