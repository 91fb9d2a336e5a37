"""A page that shows how far to believe cells of combinations that were not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.core.files import replaces
from pipeline.report.html import page_environment

MEASURES = {"delta_pearson": "correlation of shifts", "energy_over_floor": "energy distance over the floor"}
ABOUT = ("measured", "answer", "verdict")  # columns of left_out.csv beside labels and measures


def write_predicted_errors(
    path: Path, predicted: pd.DataFrame, left_out: pd.DataFrame, facts: Mapping[str, Any], notes: Sequence[str]
) -> None:
    """Write the page.

    Args:
        path: File to write.
        predicted: Rows of predicted_errors.csv.
        left_out: Rows of left_out.csv.
        facts: Of the stage: answer (that is judged), coverage_90, verdict_right, verdict_always, best_free, n_left_out.
        notes: What a reader must know.
    """
    first = [c for c in left_out if c not in ABOUT and not c.startswith(tuple(MEASURES))]
    answers = list(dict.fromkeys(left_out["answer"]))
    means = left_out.groupby("answer", sort=False)[list(MEASURES)].mean()
    page = page_environment().get_template("predicted_errors.html.jinja").render(
        labels=first, measures=MEASURES, predicted=predicted.to_dict("records"), facts=facts, notes=notes,
        answers=answers, means={name: means.loc[name].to_dict() for name in answers},
        left_out=left_out[left_out["answer"] == facts["answer"]].to_dict("records"),
    )  # fmt: skip
    with replaces(path) as tmp:
        tmp.write_text(page)
