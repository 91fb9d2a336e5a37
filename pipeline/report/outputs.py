"""Write an evaluation to metrics.json, metrics.csv and classes.csv, and say in short what it found."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.files import write_json_atomic
from pipeline.report.combinations import combination_means, combination_rows, write_combinations
from pipeline.report.evaluation import NB, POISSON, SHUFFLED, Evaluation
from pipeline.report.html import number
from pipeline.report.rows import MetricRow
from pipeline.report.verdict import copies_suspected
from scldm.metrics.cell_set import class_text
from scldm.metrics.score import Score

KEY_FIGURES = {  # of the summary: name -> what it is called there
    "w2": "distance (Wasserstein-2)",
    "auroc": "real or fake? (AUROC)",
    "coverage": "variety (coverage)",
}
LABEL_FIGURE, MOST_LABELS = "label_accuracy.", 2
WIDTH, TITLE, COLUMN = 78, 33, 15  # of the summary, in columns


def table_row(row: MetricRow, baselines: Mapping[str, Any]) -> dict[str, Any]:
    """Return one metric: value and 95 % interval of every candidate, and the verdict against every baseline."""
    out: dict[str, Any] = {
        "metric": row.name,
        "title": row.score.title,
        "group": row.score.group,
        "better": row.score.better,
        "ideal": row.score.ideal,
    }
    scores: dict[str, Score | None] = {"generated": row.score, "floor": row.floor}
    scores |= {name: row.baselines.get(name) for name in baselines}
    for name, score in scores.items():
        low, high = (None, None) if score is None or score.interval is None else score.interval
        low, high = (None if v is None or abs(v) == float("inf") else v for v in (low, high))
        out |= {name: None if score is None else score.value, f"{name}_low": low, f"{name}_high": high}
    out["at_floor"] = row.at_floor
    return out | {f"against {name}": row.against(name) for name in baselines}


def class_rows(result: Evaluation) -> list[dict[str, Any]]:
    """Return a long table: candidate, label (or combination), class, cells, metric, value.

    A class without scores has one row.
    """
    rows: list[dict[str, Any]] = []
    for candidate, tables in result.classes.items():
        for label, table in tables.items():
            for name, found in table.classes.items():
                about: dict[str, Any] = {"candidate": candidate, "label": label, "class": class_text(name)}
                about |= {"real_cells": found.n_real, "cells": found.n_candidate}
                rows += [{**about, "metric": m, "value": float(v[0])} for m, v in found.values.items()]
            for name, (n, m) in table.left_out.items():
                about = {"candidate": candidate, "label": label, "class": class_text(name), "real_cells": n, "cells": m}
                rows.append({**about, "metric": "too few cells", "value": None})
    return rows


def write_tables(folder: Path, result: Evaluation) -> None:
    """Write metrics.json with everything, metrics.csv and classes.csv; with combinations that no training cell has,
    combinations.csv and combinations.html."""
    rows = [table_row(row, result.baselines) for row in result.rows]
    classes = class_rows(result)
    summary = {
        "verdict": result.verdict,
        "notes": result.notes,
        "facts": result.facts,
        "baselines": list(result.baselines),
        "rows": rows,
        "classes": classes,
        **({"left_out": result.left_out} if result.left_out else {}),
        **({} if result.truth is None else {"process": result.truth.as_plain()}),
        **({"combinations": means} if (means := combination_means(result.combinations)) else {}),
    }
    write_json_atomic(folder / "metrics.json", summary)
    _write_csv(folder / "metrics.csv", rows)
    _write_csv(folder / "classes.csv", classes)
    if result.combinations.scored:
        _write_csv(folder / "combinations.csv", combination_rows(result.combinations))
        write_combinations(folder / "combinations.html", result.combinations)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


def summary_lines(result: Evaluation) -> list[str]:
    """Return a short table and one sentence, for a terminal: at most WIDTH columns, no colour.

    Six figures at most, of the generated cells, of real cells against other real ones, and of the simple baseline whose
    Wasserstein-2 distance is nearest to the latter. All scores, with intervals, are in the report and in metrics.csv.
    """
    best = _best_baseline(result)
    found = {row.name: row for row in result.rows}
    rows = [(title, found[name], number) for name, title in KEY_FIGURES.items() if name in found]
    labels = [row for row in result.rows if row.name.startswith(LABEL_FIGURE)][:MOST_LABELS]
    rows += [(f"{row.name.removeprefix(LABEL_FIGURE)} found again (kNN)", row, _percent) for row in labels]
    columns = ("generated", "real vs real", best)
    lines = ["", f"{'':<{TITLE}}" + "".join(f"{name:>{COLUMN}}" for name in columns)]
    for title, row, shown in rows:
        scores = (row.score, row.floor, row.baselines.get(best))
        values = "".join(f"{'–' if score is None else shown(score.value):>{COLUMN}}" for score in scores)
        lines.append(f"{_cut(title)}{values}")
    if "memorisation_share" in found and not result.changed:
        said = "possible" if copies_suspected(found["memorisation_share"]) else "none found"
        lines.append(f"{_cut('copies of training cells')}{said:>{COLUMN}}")
    first, _, _ = result.verdict.partition(". ")
    return [*lines, "", *textwrap.wrap(first.removesuffix(".") + ".", WIDTH), ""]


def _best_baseline(result: Evaluation) -> str:
    """Return the simple baseline whose Wasserstein-2 distance is nearest to that of real cells."""
    simple = [name for name in (NB, POISSON, SHUFFLED) if "w2" in result.baselines.get(name, {})]
    if not simple or "w2" not in result.floor:
        return NB
    return min(simple, key=lambda name: abs(result.baselines[name]["w2"].value - result.floor["w2"].value))


def _cut(title: str) -> str:
    return f"{title if len(title) < TITLE else title[: TITLE - 2] + '…':<{TITLE}}"


def _percent(value: float) -> str:
    return f"{value:.0%}"
