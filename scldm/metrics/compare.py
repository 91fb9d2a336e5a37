"""One comparison of two sets of cells: a flat dict of named scores.

The same function scores generated cells, the floor and every baseline, on one held-out real set, in one space, at one
number of cells. **Floor**: held-out real cells against as many *training* real cells (which the space, the classifier
and the baselines have not seen); halves of a held-out set would be too small. No model should be expected to be nearer.

Label scores are of a classifier trained on real reference cells; their floor is the score of the held-out real cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp

from scldm.metrics import distances, expression, two_sample
from scldm.metrics.projection import RealSpace

Group = Literal["expression", "cells", "distance", "two-sample", "label", "reconstruction"]


@dataclass(frozen=True)
class CellSet:
    """Counts over the vocabulary and class names per label (None where no label was given)."""

    counts: sp.csr_matrix  # (n, g)
    labels: Mapping[str, np.ndarray]  # label -> (n,) of str or None

    def __post_init__(self) -> None:
        for name, values in self.labels.items():
            if len(values) != self.n_cells:
                raise ValueError(f"label {name!r} has {len(values)} values for {self.n_cells} cells")

    @property
    def n_cells(self) -> int:
        return self.counts.shape[0]

    def __getitem__(self, index: np.ndarray) -> CellSet:
        return CellSet(self.counts[index], {k: v[index] for k, v in self.labels.items()})


@dataclass(frozen=True)
class Score:
    """A value and how to read it."""

    value: float
    better: Literal["lower", "higher", "ideal"]  # "ideal": the nearer to `ideal`, the better
    ideal: float
    group: Group
    title: str


def departure(score: Score, floor: Score) -> float:
    """Distance from the floor, to either side; 0 at best.

    Doing better than real against real is no merit: cells that are all typical have a lower W2, a higher precision and
    labels that are easier to recognise than real cells have.
    """
    return abs(score.value - floor.value)


@dataclass(frozen=True)
class CompareSettings:
    n_neighbors: int  # of the label classifier
    transport_cells: int  # most cells in the exact Wasserstein distance
    seed: int


def compare(
    real: CellSet, candidate: CellSet, *, reference: CellSet, space: RealSpace, settings: CompareSettings
) -> dict[str, Score]:
    """Score a candidate set of cells against held-out real cells.

    Args:
        real: Held-out real cells.
        candidate: Generated cells, training cells (the floor) or a baseline's; of real's number and composition.
        reference: Real training cells that the label classifier learns from.
        space: Fitted on real training cells.
    """
    return {
        **_expression_scores(real, candidate),
        **_space_scores(space.project(real.counts), space.project(candidate.counts), settings),
        **label_scores(candidate, reference=reference, space=space, n_neighbors=settings.n_neighbors),
    }


def _expression_scores(real: CellSet, candidate: CellSet) -> dict[str, Score]:
    moments = [expression.gene_moments(expression.chunks(c.counts)) for c in (real, candidate)]
    agreement = expression.gene_statistics_agreement(*moments)
    titles = {"r2": "R² (identity line)", "pearson2": "squared Pearson"}
    out = {}
    for name, value in agreement.items():
        statistic, kind = name.removeprefix("gene_").rsplit("_", 1)
        title = f"gene {statistic.replace('_', ' ')}, {titles[kind]}"
        out[name] = Score(value, "higher", 1.0, "expression", title)
    zeros = abs(expression.zero_fraction(candidate.counts) - expression.zero_fraction(real.counts))
    out["zero_fraction_difference"] = Score(zeros, "lower", 0.0, "expression", "zero fraction, absolute difference")
    for name, of_cells in (
        ("library_size_ks", expression.library_sizes),
        ("genes_per_cell_ks", expression.genes_per_cell),
    ):
        value = expression.ks_statistic(of_cells(real.counts), of_cells(candidate.counts))
        out[name] = Score(value, "lower", 0.0, "cells", f"{name.removesuffix('_ks').replace('_', ' ')}, KS")
    return out


def _space_scores(x: np.ndarray, y: np.ndarray, settings: CompareSettings) -> dict[str, Score]:
    rng = np.random.default_rng(settings.seed)
    transport = {
        f"w{p}": distances.wasserstein(x, y, power=p, max_points=settings.transport_cells, rng=rng) for p in (1, 2)
    }
    n = min(len(x), len(y))
    a, b = x[rng.permutation(len(x))[:n]], y[rng.permutation(len(y))[:n]]  # two-sample scores want equal numbers
    manifolds = two_sample.manifold_metrics(a, b)
    lower = {
        "frechet": (distances.frechet_distance(x, y), "Fréchet distance (squared)"),
        "mmd2": (distances.mmd2_rbf(x, y), "MMD², five σ (CFGen)"),
        "mmd2_median": (distances.mmd2_median(x, y), "MMD², median σ"),
        "energy": (distances.energy_distance(x, y), "energy distance"),
        "w1": (transport["w1"], "Wasserstein-1, exact"),
        "w2": (transport["w2"], "Wasserstein-2, exact"),
    }
    told_apart = {
        "auroc": (two_sample.classifier_auroc(a, b, seed=settings.seed), "AUROC real/generated, logistic"),
        "one_nn_accuracy": (two_sample.nearest_neighbor_accuracy(a, b), "1-NN accuracy real/generated"),
    }
    return {
        **{k: Score(v, "lower", 0.0, "distance", title) for k, (v, title) in lower.items()},
        **{k: Score(v, "ideal", 0.5, "two-sample", title) for k, (v, title) in told_apart.items()},
        "precision": Score(manifolds.precision, "higher", 1.0, "two-sample", "precision"),
        "recall": Score(manifolds.recall, "higher", 1.0, "two-sample", "recall"),
        "density": Score(manifolds.density, "ideal", 1.0, "two-sample", "density"),
        "coverage": Score(manifolds.coverage, "higher", 1.0, "two-sample", "coverage"),
    }


def label_scores(cells: CellSet, *, reference: CellSet, space: RealSpace, n_neighbors: int) -> dict[str, Score]:
    """`label_accuracy.<label>`, its macro mean, `label_recall.<label>.<class>`; a label that no cell has is absent."""
    out: dict[str, Score] = {}
    for name, agreement in label_agreements(cells, reference=reference, space=space, n_neighbors=n_neighbors).items():
        for key, value in (("accuracy", agreement.accuracy), ("macro_accuracy", agreement.macro_accuracy)):
            title = f"{name}: kNN {key.replace('_', ' ')}"
            out[f"label_{key}.{name}"] = Score(value, "higher", 1.0, "label", title)
        for class_name, value in agreement.per_class.items():
            out[f"label_recall.{name}.{class_name}"] = Score(value, "higher", 1.0, "label", f"{name} = {class_name}")
    return out


def label_agreements(
    cells: CellSet, *, reference: CellSet, space: RealSpace, n_neighbors: int
) -> dict[str, two_sample.LabelAgreement]:
    """kNN agreement for each label that some cell of both sets has."""
    train, points = space.project(reference.counts), space.project(cells.counts)
    has = lambda s, name: any(isinstance(v, str) for v in s.labels[name])  # noqa: E731
    return {
        name: two_sample.label_agreement(train, reference.labels[name], points, values, n_neighbors=n_neighbors)
        for name, values in cells.labels.items()
        if has(cells, name) and name in reference.labels and has(reference, name)
    }
