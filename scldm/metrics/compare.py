"""Compare two sets of cells: a flat dict of named scores.

The same function scores generated cells, the floor and every baseline, on one held-out real set, in one space, at one
number of cells. **Floor**: held-out real cells against as many *training* real cells (which the space, the classifiers
and the baselines have not seen); halves of a held-out set would be too small. No model should be expected to be nearer.

If a candidate holds log1p CP10k values of a Gaussian head, all are compared on that scale (`counted` is False): real
cells and baselines are transformed to it, and the scores of `ONLY_OF_COUNTS` do not exist.

Every score has resamples (see `resampling`): resample k takes the same half of the real cells for every candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import scipy.sparse as sp

from scldm.metrics.cell_set import CellSet
from scldm.metrics.conditional import ClassTable, ConditionalSettings, Controls, class_averages, class_tables
from scldm.metrics.distribution import distances, two_sample
from scldm.metrics.distribution.memorisation import NearestTraining
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.genes import expression
from scldm.metrics.genes.fold_change import OF_COUNTS, OF_LOG_VALUES
from scldm.metrics.genes.gene_correlation import gene_correlation_scores
from scldm.metrics.labels import LabelJudges
from scldm.metrics.score import Score, checked
from scldm.metrics.side import Side

REAL, OTHER = 0, 1  # random streams of halves
_NO_ZEROS = "log1p CP10k values of a Gaussian head are hardly ever exactly zero"
ONLY_OF_COUNTS = {  # score of a comparison of counts -> why a comparison on log1p CP10k has none
    "library_size_ks": "every cell has been scaled to 10,000 counts",
    "genes_per_cell_ks": _NO_ZEROS,
    "zero_fraction_difference": _NO_ZEROS,
    "gene_zero_fraction_r2": _NO_ZEROS,
    "gene_zero_fraction_pearson2": _NO_ZEROS,
}


@dataclass(frozen=True)
class CompareSettings:
    """Settings of a comparison."""

    n_neighbors: int  # label classifier
    transport_cells: int  # at most, in an exact Wasserstein distance
    seed: int
    conditional: ConditionalSettings
    resamples: int = 100  # halves of scores that are sums over cells or pairs
    refits: int = 10  # halves of scores that are computed from scratch: transport, neighbours, classifier, classes


@dataclass(frozen=True)
class Compared:
    """Scores of one candidate, and its scores within classes."""

    scores: dict[str, Score]
    classes: dict[str, ClassTable]


class Comparison:
    """Scores candidates against held-out real cells.

    Args:
        real: Held-out real cells.
        reference: Real training cells: the label classifiers learn from them, and copies are searched among them.
        space: Space fitted on real cells.
        settings: Settings of the comparison.
        training_space: Space fitted on training cells, in which copies are searched. In a space fitted on the held-out
            cells, these lie farther out than others, and everything else would look copied. None if `space` itself is
            fitted on training cells.
        counted: Whether all candidates hold counts.
        labels: Labels that all candidates have: halves are drawn within them, and scores computed within their classes.
    """

    def __init__(
        self,
        real: CellSet,
        reference: CellSet,
        space: RealSpace,
        settings: CompareSettings,
        *,
        labels: Sequence[str] = (),
        training_space: RealSpace | None = None,
        counted: bool = True,
    ):
        self.training_space, self.counted = training_space, counted
        self.changes = OF_COUNTS if counted else OF_LOG_VALUES
        self.space, self.settings, self.labels = space, settings, tuple(labels)
        self.reference_points = space.place(reference)
        self.judges = LabelJudges(self.reference_points, reference.labels, n_neighbors=settings.n_neighbors)
        self.nearest = NearestTraining(self._among_training(reference, self.reference_points))
        self.controls = Controls(reference, self.changes.values(reference, space.genes), self.changes)
        self.real = self.side(real, REAL)

    def side(self, cells: CellSet, stream: int = OTHER) -> Side:
        """Project cells to the space and draw their halves."""
        s = self.settings
        return Side.create(
            cells, self.space.place(cells), cells.crossed(self.labels),
            resamples=s.resamples, refits=s.refits, key=(s.seed, stream),
        )  # fmt: skip

    def all_scores(self, candidates: Mapping[str, CellSet]) -> dict[str, Compared]:
        """Return the scores of every candidate; those within classes are averaged over the classes that all have."""
        results = {name: self.scores(cells, name) for name, cells in candidates.items()}
        averages = class_averages(
            {name: result.classes for name, result in results.items()}, self.settings.conditional.average
        )
        return {
            name: Compared(result.scores | checked(averages[name], name), result.classes)
            for name, result in results.items()
        }

    def scores(self, candidate: CellSet, name: str = "the candidate") -> Compared:
        """Score a candidate: generated cells, training cells (the floor) or a baseline's; one score per class.

        Args:
            candidate: Cells, as many as the real ones and of their composition.
            name: Name of the candidate in errors.

        Raises:
            FloatingPointError: Scores are NaN or infinite; the message names them.
        """
        side = self.side(candidate)
        classes = class_tables(
            self.real, side, labels=self.labels,
            levels=(self._real_levels, self.changes.values(candidate, self.space.genes)),
            controls=self.controls, settings=self.settings.conditional,
        )  # fmt: skip
        scores = {
            **expression_scores(self.real, side, counted=self.counted),
            **(cell_scores(self.real, side) if self.counted else {}),
            **gene_correlation_scores(self.real, side),
            **self._distance_scores(side),
            **self._refitted_scores(side),
            **self.judges.scores(side.points, candidate.labels, side.weights[1:]),
            **self.nearest.scores(self._real_nearest, self._nearest(side), self.real, side),
        }
        return Compared(checked(scores, name), classes)

    def real_label_scores(self) -> dict[str, Score]:
        """Return the classifiers' scores on held-out real cells: the floor of the label scores."""
        return self.judges.scores(self.real.points, self.real.cells.labels, self.real.weights[1:])

    # ---- statistics of the real cells, computed once -------------------------------------------------------------
    @cached_property
    def _real_levels(self) -> sp.csr_matrix:
        return self.changes.values(self.real.cells, self.space.genes)

    @cached_property
    def _real_nearest(self) -> np.ndarray:
        return self._nearest(self.real)

    @cached_property
    def _kernels(self) -> dict[str, distances.Kernel]:
        median = distances.median_distance(self.real.points)
        return {
            "mmd2": distances.rbf_sum(distances.CFGEN_SIGMAS),
            "mmd2_median": distances.rbf_sum((median,)),
            "energy": distances.root,
        }

    @cached_property
    def _real_pairs(self) -> np.ndarray:
        x, u = self.real.points, self.real.weights
        return distances.weighted_pair_means(x, x, list(self._kernels.values()), u=u, v=u)

    @cached_property
    def _real_gaussians(self) -> list[distances.Gaussian]:
        halves = [self.real.half(k) for k in range(len(self.real.halves))]
        return [distances.gaussian(x) for x in [self.real.points, *halves]]

    def _nearest(self, side: Side) -> np.ndarray:
        return self.nearest.distances(self._among_training(side.cells, side.points))

    def _among_training(self, cells: CellSet, points: np.ndarray) -> np.ndarray:
        return points if self.training_space is None else self.training_space.place(cells)

    # ---- families of scores --------------------------------------------------------------------------------------
    def _distance_scores(self, candidate: Side) -> dict[str, Score]:
        x, y, u, v = self.real.points, candidate.points, self.real.weights, candidate.weights
        kernels = list(self._kernels.values())
        within = self._real_pairs + distances.weighted_pair_means(y, y, kernels, u=v, v=v)
        across = distances.weighted_pair_means(x, y, kernels, u=u, v=v)
        discrepancy = np.maximum(within - 2 * across, 0)
        energy = np.maximum(2 * across[2] - within[2], 0)
        halves = [candidate.half(k) for k in range(len(candidate.halves))]
        gaussians = [distances.gaussian(z) for z in [y, *halves]]
        frechet = np.array(
            [distances.frechet_gaussians(*a, *b) for a, b in zip(self._real_gaussians, gaussians, strict=True)]
        )
        return {
            "frechet": _score(frechet, "lower", 0.0, "distance", "Fréchet distance (squared)"),
            "mmd2": _score(discrepancy[0], "lower", 0.0, "distance", "MMD², five σ (CFGen)"),
            "mmd2_median": _score(discrepancy[1], "lower", 0.0, "distance", "MMD², median σ"),
            "energy": _score(energy, "lower", 0.0, "distance", "energy distance"),
        }

    def _refitted_scores(self, candidate: Side) -> dict[str, Score]:
        """Return scores of all cells and of halves, each computed from scratch."""
        rows = [self._refitted(self.real.points[self.real.order], candidate.points[candidate.order])]
        rows += [self._refitted(self.real.half(k), candidate.half(k), halved=True) for k in range(candidate.refits)]
        values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        share = (0.0, 1.0)
        return {
            "w1": _score(values["w1"], "lower", 0.0, "distance", "Wasserstein-1, exact"),
            "w2": _score(values["w2"], "lower", 0.0, "distance", "Wasserstein-2, exact"),
            "auroc": _score(values["auroc"], "ideal", 0.5, "two-sample", "AUROC real/generated, logistic", share),
            "one_nn_accuracy": _score(
                values["one_nn_accuracy"], "ideal", 0.5, "two-sample", "1-NN accuracy real/generated", share
            ),
            "precision": _score(values["precision"], "higher", 1.0, "two-sample", "precision", share),
            "recall": _score(values["recall"], "higher", 1.0, "two-sample", "recall", share),
            "density": _score(values["density"], "ideal", 1.0, "two-sample", "density"),
            "coverage": _score(values["coverage"], "higher", 1.0, "two-sample", "coverage", share),
        }

    def _refitted(self, x: np.ndarray, y: np.ndarray, *, halved: bool = False) -> dict[str, float]:
        n = min(len(x), len(y))  # two-sample scores need equal numbers
        a, b = x[:n], y[:n]
        points = self.settings.transport_cells
        points = -(-points // 2) if halved else points
        manifolds = two_sample.manifold_metrics(a, b)
        return {
            "w1": distances.matched(a, b, power=1, points=points),
            "w2": distances.matched(a, b, power=2, points=points),
            "auroc": two_sample.classifier_auroc(a, b, seed=self.settings.seed),
            "one_nn_accuracy": two_sample.nearest_neighbor_accuracy(a, b),
            "precision": manifolds.precision,
            "recall": manifolds.recall,
            "density": manifolds.density,
            "coverage": manifolds.coverage,
        }


def expression_scores(real: Side, candidate: Side, *, counted: bool = True) -> dict[str, Score]:
    """Score genes in log1p CP10k.

    Args:
        counted: Whether the comparison is of counts; see `expression.gene_statistics_agreement`.
    """
    value = expression.gene_statistics_agreement(real.moments, candidate.moments, counted=counted)
    halves = [
        expression.gene_statistics_agreement(a, b, counted=counted)
        for a, b in zip(real.half_moments, candidate.half_moments, strict=True)
    ]
    titles = {"r2": "R² (identity line)", "pearson2": "squared Pearson"}
    out = {}
    for name in value:
        statistic, kind = name.removeprefix("gene_").rsplit("_", 1)
        title = f"gene {statistic.replace('_', ' ')}, {titles[kind]}"
        replicates = np.array([value[name], *(h[name] for h in halves)])
        out[name] = _score(replicates, "higher", 1.0, "expression", title, (-np.inf, 1.0))
    return out


def cell_scores(real: Side, candidate: Side) -> dict[str, Score]:
    """Score zeros, library sizes and genes per cell of raw counts."""
    out = {}
    g = real.cells.counts.shape[1]
    a, b = (expression.genes_per_cell(s.cells.counts).astype(float) for s in (real, candidate))
    zeros = abs(real.weights @ a - candidate.weights @ b) / g
    title = "zero fraction, absolute difference"
    out["zero_fraction_difference"] = _score(zeros, "lower", 0.0, "expression", title, (0.0, 1.0))
    sizes = [expression.library_sizes(s.cells.counts) for s in (real, candidate)]
    for name, (x, y) in (("library_size", sizes), ("genes_per_cell", (a, b))):
        ks = expression.weighted_ks(x, y, real.weights, candidate.weights)
        title = f"{name.replace('_', ' ')}, KS"
        out[f"{name}_ks"] = _score(ks, "lower", 0.0, "cells", title, (0.0, 1.0))
    return out


def _score(
    values: np.ndarray,
    better: Literal["lower", "higher", "ideal"],
    ideal: float,
    group: Literal["expression", "cells", "distance", "two-sample"],
    title: str,
    bounds: tuple[float, float] | None = None,
) -> Score:
    """Build a score from the value of all cells, followed by those of halves."""
    bounds = bounds or ((0.0, np.inf) if better != "higher" else (-np.inf, np.inf))
    return Score(float(values[0]), better, ideal, group, title, values[1:], bounds)
