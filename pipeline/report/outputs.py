"""Write an evaluation to metrics.json, metrics.csv and classes.csv, and print a table to the terminal."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.core.files import write_json_atomic
from pipeline.report.combinations import combination_means, combination_rows, write_combinations
from pipeline.report.evaluation import NB, Evaluation
from pipeline.report.html import number
from pipeline.report.rows import MetricRow
from scldm.metrics.cell_set import class_text
from scldm.metrics.score import Score

KEY_FIGURES = {
    *("reconstruction_nll", "reconstruction_gene_pearson", "gene_mean_r2", "gene_variance_r2", "frechet", "mmd2", "w2"),
    *("auroc", "zero_fraction_difference", "library_size_ks", "genes_per_cell_ks", "gene_correlation_pearson"),
    "memorisation_share",
}
KEY_PREFIXES = ("label_accuracy.", "conditional_w2.", "conditional_lfc_slope.")


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


def print_key_figures(result: Evaluation, console: Console) -> None:
    """Print a short table: values with half of their intervals, and the verdict against the NB baseline."""
    table = Table(title="Generated against held-out real cells (± half of the 95 % interval)")
    table.add_column("metric")
    for column in ("generated", "floor", *result.baselines):
        table.add_column(column, justify="right")
    table.add_column(f"against {NB}")
    for row in result.rows:
        if row.name in KEY_FIGURES or row.name.startswith(KEY_PREFIXES):
            others = [row.floor, *(row.baselines.get(name) for name in result.baselines)]
            at_floor = " (= floor)" if row.at_floor else ""
            table.add_row(row.score.title, *map(_cell, (row.score, *others)), f"{row.against(NB) or ''}{at_floor}")
    console.print(table)
    console.print(result.verdict)


def _cell(score: Score | None) -> str:
    if score is None:
        return "–"
    return number(score.value) + ("" if score.half_width is None else f" ±{score.half_width:.2g}")
