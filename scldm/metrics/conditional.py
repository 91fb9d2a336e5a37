"""Distances and fold changes inside classes: is a generated B cell near real B cells?

A distance of all cells is small if the classes stand where they should, even if each is wrong inside, and it does not
see cells that carry each other's labels. So the same distances are taken within every class of a label, and of the
crossing of all labels, and averaged: by the number of real cells, or each class alike (CFGen's way). Classes with fewer
than `min_cells` on either side are not scored but listed by name.

Shape letters: n cells, p coordinates, h genes, r resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp

from scldm.metrics import distances
from scldm.metrics.cell_set import CLASSES, LABELS, label_sets
from scldm.metrics.fold_change import log_fold_change, recovery, weighted_sum
from scldm.metrics.score import Score
from scldm.metrics.side import Side

DISTANCES = {
    "w1": "Wasserstein-1, exact",
    "w2": "Wasserstein-2, exact",
    "mmd2": "MMD², five σ",
    "frechet": "Fréchet distance (squared)",
    "energy": "energy distance",
}
CHANGES = {"lfc_pearson": "log fold changes, Pearson", "lfc_slope": "log fold changes, slope"}


@dataclass(frozen=True)
class ConditionalSettings:
    min_cells: int  # a class has on either side, or it is listed only
    transport_cells: int
    average: Literal["cells", "classes"]
    control: Mapping[str, str]  # label -> class that the others are compared with in fold changes; empty: the rest


@dataclass(frozen=True)
class ClassScores:
    n_real: int
    n_made: int
    values: dict[str, float]  # metric -> value


@dataclass(frozen=True)
class ClassTable:
    """Of one label, or crossing of labels."""

    labels: tuple[str, ...]
    classes: dict[str, ClassScores]
    left_out: dict[str, tuple[int, int]]  # class -> real and candidate cells


def conditional_scores(
    real: Side,
    made: Side,
    *,
    labels: Sequence[str],
    cp10k: tuple[sp.csr_matrix, sp.csr_matrix],
    settings: ConditionalSettings,
) -> tuple[dict[str, Score], dict[str, ClassTable]]:
    """`conditional_<metric>.<label>`, means over classes, and the classes themselves.

    Args:
        labels: Those that the cells of both sides have; what they are compared within follows (`label_sets`).
        cp10k: Counts per 10,000 of the space's genes, (n, h), of both sides.
    """
    scores: dict[str, Score] = {}
    tables: dict[str, ClassTable] = {}
    for name, crossed in label_sets(labels).items():
        own, other = real.cells.crossed(crossed), made.cells.crossed(crossed)
        counts = {
            c: (int((own == c).sum()), int((other == c).sum())) for c in sorted({v for v in own if v is not None})
        }
        scored = [c for c, n in counts.items() if min(n) >= settings.min_cells]
        found = {c: _class_distances(real, made, own == c, other == c, settings.transport_cells) for c in scored}
        changes = _changes(cp10k, (real, made), (own, other), crossed, scored, settings)
        for c, values in changes.items():
            found[c] |= values
        tables[name] = ClassTable(
            crossed,
            {c: ClassScores(*counts[c], {k: float(v[0]) for k, v in found[c].items()}) for c in scored},
            {c: n for c, n in counts.items() if c not in scored},
        )
        shares = {c: counts[c][0] if settings.average == "cells" else 1 for c in scored}
        scores |= _averages(name, found, shares)
    return scores, tables


def _averages(name: str, found: Mapping[str, Mapping[str, np.ndarray]], shares: Mapping[str, int]) -> dict[str, Score]:
    out = {}
    for metric in {**DISTANCES, **CHANGES}:
        having = [c for c in found if metric in found[c]]
        if not having:
            continue
        weights = np.array([shares[c] for c in having], dtype=float)
        mean = weights @ np.stack([found[c][metric] for c in having]) / weights.sum()
        title = f"within {name.replace(LABELS, ' × ')}: {({**DISTANCES, **CHANGES})[metric]}"
        better, ideal, bounds = _reading(metric)
        out[f"conditional_{metric}.{name}"] = Score(
            float(mean[0]), better, ideal, "conditional", title, mean[1:], bounds
        )
    return out


def _reading(metric: str) -> tuple[Literal["lower", "higher", "ideal"], float, tuple[float, float]]:
    if metric == "lfc_pearson":
        return "higher", 1.0, (-1.0, 1.0)
    return ("ideal", 1.0, (-np.inf, np.inf)) if metric == "lfc_slope" else ("lower", 0.0, (0.0, np.inf))


def _class_distances(
    real: Side, made: Side, own: np.ndarray, other: np.ndarray, transport_cells: int
) -> dict[str, np.ndarray]:
    """Metric -> (1 + refits,): of all cells of the class, then of halves of it."""
    a, b = real.order[own[real.order]], made.order[other[made.order]]  # positions, in the fixed order
    sets = [(real.points[a], made.points[b])]
    for k in range(real.refits):
        sets.append((real.points[a[real.halves.chosen[k, a]]], made.points[b[made.halves.chosen[k, b]]]))
    rows = [_distances(x, y, transport_cells if i == 0 else -(-transport_cells // 2)) for i, (x, y) in enumerate(sets)]
    return {metric: np.array([row[metric] for row in rows]) for metric in DISTANCES}


def _distances(x: np.ndarray, y: np.ndarray, transport_cells: int) -> dict[str, float]:
    return {
        "w1": distances.matched(x, y, power=1, points=transport_cells),
        "w2": distances.matched(x, y, power=2, points=transport_cells),
        "mmd2": distances.mmd2_rbf(x, y),
        "frechet": distances.frechet_distance(x, y),
        "energy": distances.energy_distance(x, y),
    }


def _changes(
    cp10k: tuple[sp.csr_matrix, sp.csr_matrix],
    sides: tuple[Side, Side],
    keys: tuple[np.ndarray, np.ndarray],
    crossed: tuple[str, ...],
    scored: Sequence[str],
    settings: ConditionalSettings,
) -> dict[str, dict[str, np.ndarray]]:
    """Class -> lfc_pearson and lfc_slope, (1 + refits,); without the control, and classes that have none."""
    weights = [side.weights[: 1 + side.refits] for side in sides]
    totals = [weighted_sum(x, np.arange(x.shape[0]), w) for x, w in zip(cp10k, weights, strict=True)]
    out = {}
    for c in scored:
        control = _control(c, crossed, settings.control)
        if control == c or (control is None and len(scored) < 2):
            continue
        lfc = []
        for x, key, w, total in zip(cp10k, keys, weights, totals, strict=True):
            inside = weighted_sum(x, np.flatnonzero(key == c), w)
            if control is None:
                against = (total[0] - inside[0], total[1] - inside[1])
            else:
                against = weighted_sum(x, np.flatnonzero(key == control), w)
            if (against[1] <= 0).any():
                break
            lfc.append(log_fold_change(inside[0] / inside[1], np.maximum(against[0], 0) / against[1]))
        if len(lfc) == 2:
            pearson, slope = np.array([recovery(a, b) for a, b in zip(*lfc, strict=True)]).T
            out[c] = {"lfc_pearson": pearson, "lfc_slope": slope}
    return out


def _control(name: str, crossed: tuple[str, ...], control: Mapping[str, str]) -> str | None:
    """The class that a class is compared with: the same but for the labels that have a control. None: all the rest."""
    if not set(crossed) & set(control):
        return None
    parts = name.split(CLASSES) if len(crossed) > 1 else [name]
    return CLASSES.join(control.get(label, part) for label, part in zip(crossed, parts, strict=True))
