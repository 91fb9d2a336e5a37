"""Distances and fold changes within classes: is a generated B cell near real B cells?

A distance over all cells is small if the classes are in the right places, even if each is wrong inside, and it does not
see cells with swapped labels. So the same distances are computed within every class of a label, and of the combination
of all labels, and averaged: weighted by the number of real cells, or equally (as CFGen does). Classes with fewer
than `min_cells` on either side are not scored but listed by name. Averages are over the classes that every candidate
has a score of, so that they are comparable.

Shape letters: n cells, p coordinates, h genes, r resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp

from scldm.metrics.cell_set import CLASSES, LABELS, CellSet, label_sets
from scldm.metrics.distribution import distances
from scldm.metrics.genes.fold_change import ChangeScale, recovery, weighted_sum
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
    """Settings of scores within classes."""

    min_cells: int  # classes with fewer on either side are listed, not scored
    transport_cells: int
    average: Literal["cells", "classes"]
    control: Mapping[str, str]  # label -> reference class of fold changes; if empty, all other cells


@dataclass(frozen=True)
class ClassScores:
    """Scores within one class."""

    n_real: int
    n_candidate: int
    values: dict[str, np.ndarray]  # metric -> (1 + refits,): all cells, then halves


@dataclass(frozen=True)
class ClassTable:
    """Scores of the classes of one label, or of a combination of labels."""

    labels: tuple[str, ...]
    classes: dict[str, ClassScores]
    left_out: dict[str, tuple[int, int]]  # class -> real and candidate cells


def class_tables(
    real: Side,
    candidate: Side,
    *,
    labels: Sequence[str],
    levels: tuple[sp.csr_matrix, sp.csr_matrix],
    controls: Controls,
    settings: ConditionalSettings,
) -> dict[str, ClassTable]:
    """Score within the classes of every label and of the combination of all.

    Args:
        real: Held-out real cells.
        candidate: Cells to score.
        labels: Labels that the cells of both sides have; `label_sets` gives the sets of classes.
        levels: Values of the space's genes on the scale of the controls, (n, h), of both sides.
        controls: Source of the mean of control classes.
        settings: Settings of the scores.
    """
    tables: dict[str, ClassTable] = {}
    for name, crossed in label_sets(labels).items():
        own, other = real.cells.crossed(crossed), candidate.cells.crossed(crossed)
        names = sorted({v for v in own if v is not None})
        counts = {c: (int((own == c).sum()), int((other == c).sum())) for c in names}
        scored = [c for c, n in counts.items() if min(n) >= settings.min_cells]
        values = {c: _class_distances(real, candidate, own == c, other == c, settings.transport_cells) for c in scored}
        against = _against(crossed, scored, settings, controls)
        for c, changes in _changes(levels, (real, candidate), (own, other), scored, against, controls.scale).items():
            values[c] |= changes
        tables[name] = ClassTable(
            crossed,
            {c: ClassScores(*counts[c], values[c]) for c in scored},
            {c: n for c, n in counts.items() if c not in scored},
        )
    return tables


def class_averages(
    tables: Mapping[str, Mapping[str, ClassTable]], average: Literal["cells", "classes"]
) -> dict[str, dict[str, Score]]:
    """Return candidate -> `conditional_<metric>.<label>`: means over the classes that all candidates have.

    Args:
        tables: Candidate -> label -> its classes.
        average: "cells" weighs a class by its real cells, "classes" weighs all equally.
    """
    out: dict[str, dict[str, Score]] = {candidate: {} for candidate in tables}
    for label in next(iter(tables.values()), {}):
        own = {candidate: table[label].classes for candidate, table in tables.items()}
        for metric, title in {**DISTANCES, **CHANGES}.items():
            having = [{c for c, s in classes.items() if metric in s.values} for classes in own.values()]
            common = sorted(set.intersection(*having))
            for name, classes in own.items() if common else ():
                weights = np.array([classes[c].n_real if average == "cells" else 1 for c in common], dtype=float)
                mean = weights @ np.stack([classes[c].values[metric] for c in common]) / weights.sum()
                better, ideal, bounds = _reading(metric)
                text = f"within {label.replace(LABELS, ' × ')}: {title} ({len(common)} classes)"
                score = Score(float(mean[0]), better, ideal, "conditional", text, mean[1:], bounds)
                out[name][f"conditional_{metric}.{label}"] = score
    return out


def _reading(metric: str) -> tuple[Literal["lower", "higher", "ideal"], float, tuple[float, float]]:
    if metric == "lfc_pearson":
        return "higher", 1.0, (-1.0, 1.0)
    return ("ideal", 1.0, (-np.inf, np.inf)) if metric == "lfc_slope" else ("lower", 0.0, (0.0, np.inf))


def _class_distances(
    real: Side, candidate: Side, own: np.ndarray, other: np.ndarray, transport_cells: int
) -> dict[str, np.ndarray]:
    """Return metric -> (1 + refits,): all cells of the class, then halves of it."""
    a, b = real.order[own[real.order]], candidate.order[other[candidate.order]]  # positions, in the fixed order
    sets = [(real.points[a], candidate.points[b])]
    for k in range(real.refits):
        sets.append((real.points[a[real.halves.chosen[k, a]]], candidate.points[b[candidate.halves.chosen[k, b]]]))
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


@dataclass(frozen=True, eq=False)
class Controls:
    """Real training cells of control classes, shared by all candidates as the reference of fold changes."""

    cells: CellSet
    levels: sp.csr_matrix  # (n, h)
    scale: ChangeScale

    def mean(self, crossed: tuple[str, ...], name: str) -> np.ndarray | None:
        """Return the mean values of a class, (h,); None if no training cell has it."""
        rows = np.flatnonzero(self.cells.crossed(crossed) == name)
        return np.asarray(self.levels[rows].mean(0)).ravel() if len(rows) else None


def _changes(
    levels: tuple[sp.csr_matrix, sp.csr_matrix],
    sides: tuple[Side, Side],
    keys: tuple[np.ndarray, np.ndarray],
    scored: Sequence[str],
    against: Mapping[str, np.ndarray | None] | None,
    scale: ChangeScale,
) -> dict[str, dict[str, np.ndarray]]:
    """Return class -> lfc_pearson and lfc_slope, (1 + refits,); classes without a reference have none.

    Args:
        against: Class -> mean of its control, or None for the control itself and classes without one. If None, a class
            is compared with all other cells.
    """
    if against is None and len(scored) < 2:
        return {}
    weights = [side.weights[: 1 + side.refits] for side in sides]
    totals = [weighted_sum(x, np.arange(x.shape[0]), w) for x, w in zip(levels, weights, strict=True)]
    out = {}
    for c in scored:
        control = None if against is None else against[c]
        if against is not None and control is None:
            continue
        lfc = []
        for x, key, w, total in zip(levels, keys, weights, totals, strict=True):
            inside = weighted_sum(x, np.flatnonzero(key == c), w)
            base = control
            if base is None:  # all other cells; rounding may leave a tiny negative value
                base = np.maximum((total[0] - inside[0]) / (total[1] - inside[1]), scale.least)
            lfc.append(scale.change(inside[0] / inside[1], base))
        pearson, slope = np.array([recovery(a, b) for a, b in zip(*lfc, strict=True)]).T
        out[c] = {"lfc_pearson": pearson, "lfc_slope": slope}
    return out


def _against(
    crossed: tuple[str, ...], scored: Sequence[str], settings: ConditionalSettings, controls: Controls
) -> dict[str, np.ndarray | None] | None:
    """Return the mean of the control of every class; None if these labels have no control."""
    if not set(crossed) & set(settings.control):
        return None
    names = {c: _control(c, crossed, settings.control) for c in scored}
    return {c: None if name == c else controls.mean(crossed, name) for c, name in names.items()}


def _control(name: str, crossed: tuple[str, ...], control: Mapping[str, str]) -> str:
    """Return the reference of a class: the same class, with the control of each label that has one."""
    parts = name.split(CLASSES) if len(crossed) > 1 else [name]
    return CLASSES.join(control.get(label, part) for label, part in zip(crossed, parts, strict=True))
