"""From the errors of combinations that were left out to predicted errors of those that were not measured.

The energy distance over the floor is regressed as its logarithm, the correlation of shifts by Fisher's z. The verdict
compares the cells of the job's method with the shift in counts, which anybody has for free (and these with pooled
cells): it regresses the logarithm of the ratio of both distances.

Shape letters: k combinations, s seeds, a answers, p features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.stages.unseen.finished import VERDICTS, Method
from pipeline.stages.unseen.left_out import ANSWERS, MEASURES, OURS, POOLED, Group, GroupResult
from pipeline.stages.unseen.screen import TrainingScreen
from pipeline.stages.unseen.ways import WAYS
from scldm.metrics.perturbation.error_model import (
    ErrorModel,
    Predicted,
    Verdicts,
    coverage,
    left_out_predictions,
    verdicts,
)
from scldm.metrics.perturbation.free_answers import COUNTS, FREE_ANSWERS, LINEAR, NB
from scldm.metrics.perturbation.nearness import FEATURES, as_features, disagreement, indicators, nearness
from scldm.metrics.perturbation.screen import Combination, Screen

MOST_Z = np.arctanh(0.999)
JUDGED: dict[Method, str] = {"pooled": POOLED, "flow": OURS, "shift": COUNTS}  # method of perturb -> answer
RIVALS: dict[Method, Method] = {"pooled": "shift", "flow": "shift", "shift": "pooled"}  # what the verdict compares with
PREDICTIONS, LEFT_OUT = "predicted_errors.csv", "left_out.csv"


@dataclass(frozen=True)
class LeftOut:
    """Combinations with known errors: mean over seeds of the transformed scores, and what is known near them."""

    pairs: tuple[Combination, ...]
    errors: np.ndarray  # (k, a, 2), transformed
    features: np.ndarray  # (k, p)


@dataclass(frozen=True)
class Outcome:
    """The tables of the stage, and numbers for its manifest."""

    predicted: pd.DataFrame  # a row for each combination that was asked for
    left_out: pd.DataFrame  # a row for each measured combination and answer
    facts: dict[str, Any]
    notes: list[str]


def outcome(
    cells: TrainingScreen,
    groups: Sequence[Group],
    results: Sequence[Sequence[GroupResult]],
    method: Method = "pooled",
) -> Outcome:
    """Fit the error models and predict.

    Args:
        cells: Training cells.
        groups: Groups that were left out, and one with what was not measured.
        results: By seed and group.
        method: Of the cells that are judged.
    """
    known = _left_out(cells, groups, results)
    asked = _asked(cells, groups, results, known.pairs)
    best, judged, rival = _best_free(known), JUDGED[method], RIVALS[method]
    targets: dict[tuple[str, str], np.ndarray] = {}
    for answer in dict.fromkeys((judged, best)):
        for j, measure in enumerate(MEASURES):
            targets[answer, measure] = known.errors[:, ANSWERS.index(answer), j]
    own = {key: left_out_predictions(known.features, y) for key, y in targets.items()}
    models = {key: ErrorModel.fit(known.features, y) for key, y in targets.items()}
    predicted = {key: model.predict(asked.features) for key, model in models.items()} if asked.pairs else {}
    ratio = known.errors[:, ANSWERS.index(judged), 0] - known.errors[:, ANSWERS.index(JUDGED[rival]), 0]
    said = verdicts(known.features, ratio, asked.features)
    calibrated = models[judged, MEASURES[0]].calibrated
    counts = own[judged, MEASURES[0]].calibrated  # whether each interval was made of enough other combinations
    facts = {
        "n_left_out": len(known.pairs), "n_predicted": len(asked.pairs), "best_free": best, "calibrated": calibrated,
        "coverage_90": {m: coverage(targets[judged, m], own[judged, m]) for m in MEASURES} if counts else {},
        "verdict_right": said.right if np.isfinite(said.right) else None, "verdict_always": said.always,
        "verdict_by": "nearness" if said.by_features else "the more frequent one",
        f"better_than_{rival}": float((ratio < 0).mean()), "answer": judged, "method": method,
    }  # fmt: skip
    words = [_in_words(method, better) for better in said.better]
    return Outcome(
        _predicted_table(cells, asked.pairs, predicted, (judged, best), calibrated, words),
        _left_out_table(cells, known, own, judged, [_in_words(method, better) for better in said.left_out]),
        facts,
        _notes(known, calibrated, method, said),
    )


# ---- what the models are fitted to -------------------------------------------------------------------------------
def _left_out(cells: TrainingScreen, groups: Sequence[Group], results: Sequence[Sequence[GroupResult]]) -> LeftOut:
    pairs: list[Combination] = []
    errors, features = [], []
    for i, group in enumerate(groups):
        if group.measured:
            scores = np.stack([of_seed[i].scores for of_seed in results])  # (s, k, a, 2)
            z = np.clip(np.arctanh(np.clip(scores[..., 1], -1, 1)), -MOST_Z, MOST_Z)
            errors.append(np.stack([np.log(scores[..., 0]), z], axis=-1).mean(0))
            known = cells.screen.without(group.pairs)
            features.append(_features(known, group, [of_seed[i] for of_seed in results]))
            pairs += group.pairs
    near = np.concatenate(features)
    return LeftOut(tuple(pairs), np.concatenate(errors), np.hstack([near, indicators(pairs, pairs)]))


def _asked(
    cells: TrainingScreen,
    groups: Sequence[Group],
    results: Sequence[Sequence[GroupResult]],
    known: Sequence[Combination],
) -> LeftOut:
    (i, group), *_ = [(i, g) for i, g in enumerate(groups) if not g.measured] or [(0, Group("none", (), False))]
    near = _features(cells.screen, group, [of_seed[i] for of_seed in results])
    features = np.hstack([near, indicators(group.pairs, known)])
    return LeftOut(group.pairs, np.zeros((len(group.pairs), len(ANSWERS), 2)), features)


def _features(known: Screen, group: Group, results: Sequence[GroupResult]) -> np.ndarray:
    """Return what is known near the combinations of a group, (k, p)."""
    noise, latents, guided, *free = (WAYS.index(x) for x in ("noise", "latents", "guided", "shift", NB, LINEAR))
    shift = free[0]
    found = []
    for k, pair in enumerate(group.pairs):
        numbers = nearness(known, *pair)
        strength, means = numbers["strength"], [result.means[k] for result in results]  # (w, g) each
        numbers["methods"] = float(np.mean([disagreement([m[noise], m[latents], m[shift]], strength) for m in means]))
        numbers["seeds"] = disagreement([(m[noise] + m[latents]) / 2 for m in means], strength)
        numbers["guidance"] = float(
            np.mean([disagreement([(m[noise] + m[latents]) / 2, m[guided]], strength) for m in means])
        )
        numbers["free"] = float(np.mean([disagreement([m[way] for way in free], strength) for m in means]))
        found.append(as_features(numbers))
    return np.array(found).reshape(len(group.pairs), len(FEATURES))


def _best_free(known: LeftOut) -> str:
    """Return the free answer that is nearest to the measured cells on average."""
    means = {name: float(known.errors[:, ANSWERS.index(name), 0].mean()) for name in FREE_ANSWERS}
    return min(means, key=means.__getitem__)


# ---- tables ------------------------------------------------------------------------------------------------------
def _back(measure: str, values: np.ndarray) -> np.ndarray:
    return np.tanh(values) if measure == "delta_pearson" else np.exp(values)


def _predicted_table(
    cells: TrainingScreen,
    pairs: Sequence[Combination],
    predicted: dict[tuple[str, str], Predicted],
    answers: tuple[str, str],
    calibrated: bool,
    words: Sequence[str | None],
) -> pd.DataFrame:
    """Return a row for each combination that was asked for.

    Args:
        answers: The one that is judged, and the free one that is best on average.
        words: Verdict on each.
    """
    columns: dict[str, Any] = {}
    for label in cells.vocabulary.labels:
        columns[label.name] = [cells.classes(pair)[label.name] for pair in pairs]
    for measure in reversed(MEASURES):
        for answer, prefix in zip(answers, ("", "free_"), strict=True):
            found = predicted.get((answer, measure))
            for part in ("value", "low", "high"):
                name = f"{prefix}{measure}" + ("" if part == "value" else f"_{part}")
                columns[name] = [] if found is None else _back(measure, getattr(found, part))
    columns["free_answer"] = [answers[1]] * len(pairs)
    columns["interval"] = ["90 %" if calibrated else "range of the errors"] * len(pairs)
    columns["verdict"] = list(words)
    return pd.DataFrame(columns)


def _in_words(method: Method, better: float) -> str | None:
    """Return a verdict in words; None if there is none (NaN)."""
    return None if np.isnan(better) else VERDICTS[method][not better]


def _left_out_table(
    cells: TrainingScreen,
    known: LeftOut,
    own: dict[tuple[str, str], Predicted],
    judged: str,
    words: Sequence[str | None],
) -> pd.DataFrame:
    """Return a row for each combination and answer.

    Args:
        own: Predictions made without each combination.
        judged: Answer that verdicts are about.
        words: Verdict on each combination, made without it.
    """
    rows = []
    for k, pair in enumerate(known.pairs):
        about = {**cells.classes(pair), "measured": len(cells.screen.members[pair])}
        for a, answer in enumerate(ANSWERS):
            row: dict[str, Any] = {**about, "answer": answer}
            for j, measure in enumerate(MEASURES):
                row[measure] = float(_back(measure, known.errors[k, a, j]))
                found = own.get((answer, measure))
                for part in ("value", "low", "high"):
                    name = f"{measure}_predicted" + ("" if part == "value" else f"_{part}")
                    row[name] = None if found is None else float(_back(measure, getattr(found, part)[k]))
            rows.append({**row, "verdict": words[k] if answer == judged else None})
    return pd.DataFrame(rows)


def _notes(known: LeftOut, calibrated: bool, method: Method, said: Verdicts) -> list[str]:
    n = len(known.pairs)
    cells = {"pooled": "pooled cells of perturb", "flow": "cells that a flow alone makes",
             "shift": "cells that perturb shifts"}[method]  # fmt: skip
    rival = {"shift": "the mean shift", "pooled": "pooled cells"}[RIVALS[method]]
    notes = [
        f"Judged are {cells}. Errors are learned from {n} measured combinations that were left out in turn"
        + ("." if method == "shift" else ", with short trainings; a flow that is trained longer may do better.")
    ]
    if not calibrated:
        notes.append(f"{n} combinations are too few for 90 % intervals: the range of their errors is given instead.")
    if not said.by_features:
        notes.append(
            "What is known near a combination did not tell, better than naming the more frequent winner every time "
            f"({said.always:.0%} right), which of the left-out combinations are better than {rival}: all have the "
            "verdict that was right more often."
        )
    return notes
