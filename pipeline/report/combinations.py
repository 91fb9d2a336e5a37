"""Score generated cells of combinations that no training cell has, beside every answer that is free.

The labels of `evaluate.control` are the treatment; the other labels together are the context. Known are the training
cells; asked are the combinations that were held out whole. A page of its own, combinations.html, shows each of them,
and combinations.csv holds all scores.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pipeline.report.cells import EvaluationCells
from pipeline.report.figures import shift_scatter
from pipeline.report.html import page_environment
from scldm.errors import InputError
from scldm.metrics.cell_set import CLASSES, CellSet
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.perturbation.combinations import FLOOR, MIN_CELLS, CombinationJudge, CombinationScores
from scldm.metrics.perturbation.free_answers import FREE_ANSWERS, Answer, free_answers
from scldm.metrics.perturbation.measures import LOWER, pearson
from scldm.metrics.perturbation.screen import Combination, Screen

GENERATED = "generated"
JOIN = " + "  # of the names of classes, for readers
COMPARED = ("energy", "delta_pearson", "pr_auc", "mae")  # measures by which free answers win or lose
TITLES = {
    "delta_pearson": "correlation of shifts",
    "delta_pearson_top20": "… of the 20 genes that change most",
    "delta_pearson_top50": "… of 50",
    "delta_pearson_top100": "… of 100",
    "lfc_cosine": "cosine of log fold changes",
    "lfc_slope": "slope of log fold changes",
    "mae": "mean absolute error of the mean",
    "rmse": "root mean square error of the mean",
    "pr_auc": "changed genes found (PR-AUC)",
    "des": "changed genes called",
    "energy": "energy distance",
    "mmd2": "MMD², median σ",
    "rank": "share of other treatments that are nearer",
    "pds": "discrimination score",
}
TOP_GENES = 12


@dataclass(frozen=True)
class Combinations:
    """Scores of the combinations that could be scored, and why others could not."""

    scored: tuple[CombinationScores, ...]
    left_out: Mapping[str, str]  # combination -> the reason
    genes: tuple[str, ...]
    true_shift: Mapping[Combination, np.ndarray] = field(default_factory=dict)  # (g,), of synthetic cells


def score_combinations(
    parts: EvaluationCells,
    held_out: CellSet,
    training: CellSet,
    *,
    control: Mapping[str, str],
    genes: Sequence[str],
    seed: int,
    truth: Mapping[Combination, np.ndarray] | None = None,
) -> Combinations:
    """Score generated cells and every free answer for each combination that no training cell has.

    Args:
        parts: Cells of the evaluation.
        held_out: All held-out cells.
        training: All training cells that were read.
        control: Label -> reference class; empty: nothing is scored.
        genes: Names of the genes.
        seed: Seed of subsamples and draws.
        truth: True mean log1p CP10k of combinations of synthetic cells, (g,) each, see `true_means`.
    """
    treatment = [label for label in parts.given if label in control]
    context = [label for label in parts.given if label not in control]
    if not parts.unseen or not treatment or not context:
        return Combinations((), {}, tuple(genes))
    name = JOIN.join(control[label] for label in treatment)
    try:
        known = Screen(training.counts, *_names(training, context, treatment), name)
    except InputError as error:
        return Combinations(
            (), {JOIN.join(_pair(k, parts.given, treatment)): str(error) for k in parts.unseen}, tuple(genes)
        )
    asked = {_pair(key, parts.given, treatment): key for key in parts.unseen}
    measured = {pair: held_out.counts[held_out.crossed(parts.given) == key] for pair, key in asked.items()}
    made = {pair: parts.all_generated[parts.all_generated.crossed(parts.given) == key] for pair, key in asked.items()}
    found = _scored(known, measured, made, parts.space, tuple(genes), seed)
    true = truth or {}
    shifts = {pair: mean - true[pair[0], name] for pair, mean in true.items() if (pair[0], name) in true}
    return replace(found, true_shift=shifts)


def true_means(
    truth: pd.DataFrame | None, given: Sequence[str], control: Mapping[str, str], genes: Sequence[str]
) -> dict[Combination, np.ndarray]:
    """Return the true mean log1p CP10k of each combination, (g,); {} if it is not known for these labels.

    Args:
        truth: What combinations of synthetic labels have on average, see `IngestedDataset.truth`.
        given: Labels of the cells.
        control: Label -> reference class; its labels are the treatment.
        genes: Ids of the genes, (g,).
    """
    if truth is None or set(given) != {"cell_type", "treatment"} or set(control) != {"treatment"}:
        return {}
    table = truth.pivot(index=["cell_type", "treatment"], columns="feature_id", values="mean_log")
    values = table.reindex(columns=list(genes)).to_numpy()
    return {(str(c), str(t)): row for (c, t), row in zip(table.index, values, strict=True)}


def _scored(
    known: Screen,
    measured: Mapping[Combination, sp.csr_matrix],
    made: Mapping[Combination, CellSet],
    space: RealSpace,
    genes: tuple[str, ...],
    seed: int,
) -> Combinations:
    judge = CombinationJudge(known, measured, space, seed=seed)
    scored, left_out = [], {}
    for pair, cells in made.items():
        if pair[1] == known.control:
            left_out[JOIN.join(pair)] = "it is the control itself"
        elif few := {k: n for k, n in _numbers(measured[pair], cells).items() if n < MIN_CELLS}:
            named = ", ".join(f"{n} {what}" for what, n in few.items())
            left_out[JOIN.join(pair)] = f"{named} cells; at least {MIN_CELLS} of each are needed"
        else:
            own = Answer(cells.log_values.toarray(), cells.counts if cells.counted else None)
            try:
                free = free_answers(known, *pair, np.random.default_rng(seed))
            except InputError as error:
                left_out[JOIN.join(pair)] = str(error)
            else:
                scored.append(judge.score(pair, {GENERATED: own, **free}))
    return Combinations(tuple(scored), left_out, genes)


def _numbers(measured: sp.csr_matrix, made: CellSet) -> dict[str, int]:
    return {"measured": measured.shape[0], GENERATED: made.n_cells}


def _names(cells: CellSet, context: Sequence[str], treatment: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the names of contexts and treatments, (n,) each; "none" for a cell without the label."""
    return tuple(  # type: ignore[return-value]
        np.array([JOIN.join(v if isinstance(v, str) else "none" for v in row) for row in zip(*columns, strict=True)])
        for columns in ([cells.labels[x] for x in labels] for labels in (context, treatment))
    )


def _pair(key: str, given: Sequence[str], treatment: Sequence[str]) -> Combination:
    classes = dict(zip(given, key.split(CLASSES), strict=True))
    own = [classes[x] for x in given if x not in treatment]
    return JOIN.join(own), JOIN.join(classes[x] for x in treatment)


# ---- what is said of them ----------------------------------------------------------------------------------------
def best_free(found: CombinationScores, measure: str) -> tuple[str, float] | None:
    """Return the free answer that is best by a measure, and its value; None if none has it."""
    having = {n: s[measure] for n, s in found.scores.items() if n in FREE_ANSWERS and measure in s}
    if not having:
        return None
    best = min(having, key=having.__getitem__) if measure in LOWER else max(having, key=having.__getitem__)
    return best, having[best]


def combination_notes(found: Combinations, unseen: int, control: Mapping[str, str]) -> list[str]:
    """Return what the report says of combinations that were held out."""
    notes = []
    if unseen and not control:
        notes.append(
            "Held-out combinations are scored beside the answers that are free (control cells, shifts of other "
            "contexts) if the treatment's control is known: set evaluate.control={LABEL: CLASS}."
        )
    if found.scored:
        wins = []
        for measure in COMPARED:
            pairs = [(s.scores[GENERATED].get(measure), best_free(s, measure)) for s in found.scored]
            each = [(own, best[1]) for own, best in pairs if own is not None and best is not None]
            better = sum(own < best if measure in LOWER else own > best for own, best in each)
            wins.append(f"{better} of {len(each)} by {TITLES[measure]}")
        notes.append(
            f"Combinations that no training cell has: generated cells are better than the best free answer in "
            f"{', '.join(wins)} (combinations.html)."
        )
    notes += [f"Not scored as a combination: {name}: {why}." for name, why in found.left_out.items()]
    return notes


def combination_rows(found: Combinations) -> list[dict[str, Any]]:
    """Return a long table: combination, answer, measure, value and its 95 % interval."""
    rows: list[dict[str, Any]] = []
    for one in found.scored:
        about = {
            "context": one.context,
            "treatment": one.treatment,
            "measured": one.n_measured,
            "control": one.n_control,
        }
        for answer, scores in one.scores.items():
            for measure, value in scores.items():
                interval = one.intervals[answer].get(measure)
                low, high = (None, None) if interval is None else (interval.low, interval.high)
                rows.append({**about, "answer": answer, "measure": measure, "value": value, "low": low, "high": high})
        for answer, scores in true_scores(found, one).items():
            for measure, value in scores.items():
                rows.append({**about, "answer": answer, "measure": measure, "value": value, "low": None, "high": None})
    return rows


def true_scores(found: Combinations, one: CombinationScores) -> dict[str, dict[str, float]]:
    """Return answer (or "measured") -> how near its shift is to the true one; {} if that is not known."""
    true = found.true_shift.get((one.context, one.treatment))
    if true is None:
        return {}
    return {
        name: {"true_delta_pearson": pearson(true, change.shift), "true_mae": float(np.abs(true - change.shift).mean())}
        for name, change in one.changes.items()
        if name != FLOOR
    }


def combination_means(found: Combinations) -> dict[str, dict[str, float]]:
    """Return answer -> measure -> mean over the combinations in which every answer has it."""
    names = (GENERATED, FLOOR, *FREE_ANSWERS)
    out: dict[str, dict[str, float]] = {name: {} for name in names}
    for measure in TITLES:
        having = [one for one in found.scored if all(measure in one.scores[name] for name in names)]
        for name in names if having else ():
            out[name][measure] = float(np.mean([one.scores[name][measure] for one in having]))
    return out if found.scored else {}


def titled_means(found: Combinations) -> dict[str, dict[str, float]]:
    """Return `combination_means` by the titles of measures."""
    return {name: {TITLES[m]: v for m, v in means.items()} for name, means in combination_means(found).items()}


def write_combinations(path: Path, found: Combinations) -> None:
    """Write the page: per combination the scores, the shift of genes predicted against measured, and the top genes."""
    means = combination_means(found)
    page = (
        page_environment()
        .get_template("combinations.html.jinja")
        .render(
            means=means,
            best=_best(means),
            combinations=[_shown(one, found) for one in found.scored],
            left_out=found.left_out,
            titles=TITLES,
            lower=LOWER,
            answers=(GENERATED, *FREE_ANSWERS, FLOOR),
        )
    )
    path.write_text(page)


def _best(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the best value of each measure among all answers but the floor."""
    best = {}
    for measure in TITLES:
        values = [s[measure] for name, s in scores.items() if name != FLOOR and measure in s]
        if values and measure == "lfc_slope":
            best[measure] = min(values, key=lambda v: abs(v - 1))
        elif values:
            best[measure] = min(values) if measure in LOWER else max(values)
    return best


def _shown(one: CombinationScores, found: Combinations) -> dict[str, Any]:
    real, made, genes = one.changes["measured"], one.changes[GENERATED], found.genes
    true = found.true_shift.get((one.context, one.treatment))
    top = real.order[:TOP_GENES]
    names = [genes[i] for i in top]
    pictures = {"measured": shift_scatter(real.shift, made.shift, names, top)}
    if true is not None:
        pictures["true"] = shift_scatter(true, made.shift, names, top, against="true")
    return {
        "name": JOIN.join((one.context, one.treatment)),
        "about": f"{one.n_measured:,} measured cells, {one.n_control:,} control cells of {one.context}; "
        f"{one.treatment} was measured in {', '.join(one.sources)}",
        "scores": one.scores,
        "intervals": one.intervals,
        "best": _best(one.scores),
        "pictures": {name: base64.b64encode(png).decode() for name, png in pictures.items()},
        "true_scores": true_scores(found, one),
        "genes": [
            (genes[i], float(real.shift[i]), float(made.shift[i]), None if true is None else float(true[i]))
            for i in top
        ],
    }
