"""Finds what a finished predict_error of a pipeline says of combinations, for the stages that show it.

The table is read without pandas, so that a plan can show it too.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.manifest import Manifest, newest_manifest

Method = Literal["pooled", "flow", "shift"]  # of perturb; flow: of generate too
BETTER = "better than the mean shift"
NO_BETTER = "no better than the mean shift: use method: shift"
BETTER_THAN_POOLED = "better than pooled cells"
NO_BETTER_THAN_POOLED = "no better than pooled cells: use method: pooled"
VERDICTS: Mapping[Method, tuple[str, str]] = {  # method that is judged -> the cells are better, or are not
    "pooled": (BETTER, NO_BETTER),
    "flow": (BETTER, NO_BETTER),
    "shift": (BETTER_THAN_POOLED, NO_BETTER_THAN_POOLED),
}
BELIEVED = ("delta_pearson", "delta_pearson_low", "delta_pearson_high")  # columns that stand beside cells
Classes = tuple[str, ...]  # of a combination, in the order of the labels


@dataclass(frozen=True)
class Predictions:
    """Predicted errors of combinations."""

    version: str  # of the stage that made them
    method: Method  # of the cells that they are of
    page: Path
    labels: tuple[str, ...]
    treatment: tuple[str, ...]  # those of the labels that are treatments
    rows: Mapping[Classes, Mapping[str, str]]  # as in predicted_errors.csv

    def of(self, condition: Mapping[str, str | None]) -> Mapping[str, str] | None:
        """Return the row of a condition; None if nothing is predicted for it, or a label is missing."""
        return self.rows.get(tuple(condition.get(label) or "" for label in self.labels))


def finished_predictions(
    pipeline: Path, ingest: Manifest | None, *, method: Method = "flow", start: str = "noise"
) -> Predictions | None:
    """Return the predictions that finished last in a pipeline; None if there are none for these cells.

    Args:
        pipeline: Folder of the pipeline.
        ingest: The ingest whose cells they must be of; None: any.
        method: Cells that they must be of: those of perturb with this method, or of generate.
        start: Of method: flow: those of generate (noise), or of perturb (latents).
    """

    def fits(facts: Mapping[str, Any]) -> bool:
        if facts.get("method", "flow") != method or (method == "flow" and facts.get("start") != start):
            return False  # results from before there were methods are of a flow
        return ingest is None or facts.get("data") == str(ingest.facts.get("digest", ""))

    found = newest_manifest(pipeline, "predict_error", fits)
    if found is None:
        return None
    labels = tuple(found.facts["labels"])
    with found.path("predicted").open(newline="") as file:
        rows = {tuple(row[label] for label in labels): row for row in csv.DictReader(file)}
    return Predictions(found.version, method, found.path("report"), labels, tuple(found.facts["control"]), rows)


def judged_by(perturb: Mapping[str, Any]) -> tuple[Method, str] | None:
    """Return the method and the start of a predict_error that judges the cells of a perturb job; None if none does.

    Args:
        perturb: Settings of the job, as they are kept.
    """
    if perturb.get("model") is not None:
        return None  # predictions are of the models of the pipeline
    method, start = perturb.get("method", "flow"), perturb.get("start", "latents")
    if method == "flow" and (start == "control" or perturb.get("counts", "drawn") != "drawn"):
        return None
    return None if method == "pooled" and start != "latents" else (method, start)


def believed(row: Mapping[str, str]) -> str:
    """Return what is predicted of a combination, in words."""
    r, low, high = (f"{float(row[f'delta_pearson{part}']):.2f}" for part in ("", "_low", "_high"))
    return f"predicted correlation of shifts {r} [{low}, {high}]; {row['verdict']}"


def verdict_line(found: Predictions, asked: Sequence[Mapping[str, str | None]]) -> str | None:
    """Return one line with the verdicts on some combinations; None if nothing is predicted for any of them."""
    rows = [row for condition in asked if (row := found.of(condition)) is not None]
    if not rows:
        return None
    better, no_better = VERDICTS[found.method]
    n = sum(row["verdict"] == better for row in rows)
    line = f"cells of {n} of {len(rows)} unmeasured combinations are predicted to be {better}"
    if n < len(rows):
        worse = " + ".join(next(row for row in rows if row["verdict"] != better)[x] for x in found.labels)
        named = f"{worse}, …" if len(rows) - n > 1 else worse
        line += f"; for the others ({named}) perturb has {no_better.rpartition('use ')[2]}"
    return f"{line} ({found.page})"
