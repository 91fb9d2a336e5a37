"""Finds what a finished predict_error of a pipeline says of combinations, for the stages that show it.

The table is read without pandas, so that a plan can show it too.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.manifest import Manifest, newest_manifest

BETTER = "better than the mean shift"
NO_BETTER = "no better than the mean shift: use method: shift"
Classes = tuple[str, ...]  # of a combination, in the order of the labels


@dataclass(frozen=True)
class Predictions:
    """Predicted errors of combinations."""

    version: str  # of the stage that made them
    page: Path
    labels: tuple[str, ...]
    treatment: tuple[str, ...]  # those of the labels that are treatments
    rows: Mapping[Classes, Mapping[str, str]]  # as in predicted_errors.csv

    def of(self, condition: Mapping[str, str | None]) -> Mapping[str, str] | None:
        """Return the row of a condition; None if nothing is predicted for it, or a label is missing."""
        return self.rows.get(tuple(condition.get(label) or "" for label in self.labels))


def finished_predictions(pipeline: Path, ingest: Manifest | None, *, start: str = "noise") -> Predictions | None:
    """Return the predictions that finished last in a pipeline; None if there are none for these cells.

    Args:
        pipeline: Folder of the pipeline.
        ingest: The ingest whose cells they must be of; None: any.
        start: Cells that they must be of: those of generate (noise), or of perturb (latents).
    """
    found = newest_manifest(pipeline, "predict_error")
    if found is None or found.facts.get("start") != start:
        return None
    if ingest is not None and found.facts.get("data") != str(ingest.facts.get("digest", "")):
        return None
    labels = tuple(found.facts["labels"])
    with found.path("predicted").open(newline="") as file:
        rows = {tuple(row[label] for label in labels): row for row in csv.DictReader(file)}
    return Predictions(found.version, found.path("report"), labels, tuple(found.facts["control"]), rows)


def believed(row: Mapping[str, str]) -> str:
    """Return what is predicted of a combination, in words."""
    r, low, high = (f"{float(row[f'delta_pearson{part}']):.2f}" for part in ("", "_low", "_high"))
    return f"predicted correlation of shifts {r} [{low}, {high}]; {row['verdict']}"


def verdict_line(found: Predictions, asked: Sequence[Mapping[str, str | None]]) -> str | None:
    """Return one line with the verdicts on some combinations; None if nothing is predicted for any of them."""
    rows = [row for condition in asked if (row := found.of(condition)) is not None]
    if not rows:
        return None
    better = sum(row["verdict"] == BETTER for row in rows)
    line = f"cells of {better} of {len(rows)} unmeasured combinations are predicted to be better than the mean shift"
    if better < len(rows):
        worse = " + ".join(next(row for row in rows if row["verdict"] != BETTER)[x] for x in found.labels)
        line += (
            f"; for the others ({worse}" + (", …)" if len(rows) - better > 1 else ")") + " perturb has method: shift"
        )
    return f"{line} ({found.page})"
