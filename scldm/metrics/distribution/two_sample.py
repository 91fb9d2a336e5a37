"""Two-sample tests: can generated cells be told apart from real ones?

All work on points in a space fitted on real cells (see `projection`).

Shape letters: n points of real, m points of generated, p coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scldm.errors import extra
from scldm.metrics.distribution.distances import squared_distance_blocks

with extra("score"):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.neighbors import NearestNeighbors
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler


def classifier_auroc(real: np.ndarray, generated: np.ndarray, *, seed: int, n_folds: int = 5) -> float:
    """Return the cross-validated AUROC of a logistic regression that separates generated (1) from real (0).

    Standardised coordinates, L2 with C = 1, stratified folds shuffled by `seed`, mean of the folds' AUROC. 0.5 is
    ideal, 1 is perfect separation; nearer 0.5 is better. Linear: it sees shifts of the mean, not of the shape.
    Source: classifier two-sample test, Lopez-Paz & Oquab 2017; GRouNdGAN.
    """
    if min(len(real), len(generated)) < n_folds:
        raise ValueError(f"AUROC needs at least {n_folds} cells on each side; got {len(real)} and {len(generated)}")
    x = np.concatenate([real, generated])
    y = np.repeat([0, 1], [len(real), len(generated)])
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    scores = []
    for train, test in folds.split(x, y):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
        scores.append(roc_auc_score(y[test], model.fit(x[train], y[train]).decision_function(x[test])))
    return float(np.mean(scores))


def nearest_neighbor_accuracy(real: np.ndarray, generated: np.ndarray) -> float:
    """Return the leave-one-out accuracy of a 1-nearest-neighbour classifier, real against generated.

    0.5 is ideal (neighbours are of either kind), 1 is perfect separation, below 0.5 generated cells coincide with real
    ones (copies); nearer 0.5 is better. This holds for equal numbers only. Source: Lopez-Paz & Oquab 2017; the scLDM
    paper's 1-NN.
    """
    if len(real) != len(generated):
        raise ValueError(f"1-NN accuracy needs as many generated as real cells; got {len(generated)} and {len(real)}")
    x = np.concatenate([real, generated])
    y = np.repeat([0, 1], len(real))
    neighbor = NearestNeighbors(n_neighbors=1).fit(x).kneighbors(return_distance=False)[:, 0]
    return float((y[neighbor] == y).mean())


@dataclass(frozen=True)
class Manifolds:
    """Precision, recall, density and coverage of generated cells."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_metrics(real: np.ndarray, generated: np.ndarray, *, k: int = 5) -> Manifolds:
    """Return precision, recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Higher is better. A set's manifold is the union of balls around its points, each to the k-th nearest other point of
    the set.
    precision: share of generated in the real manifold. recall: share of real in the generated manifold.
    density: mean over generated of (real balls that hold it) / k, 1 expected, may exceed 1.
    coverage: share of real whose ball holds a generated point. Ceiling well below 1: compare with the floor.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"manifold metrics need more than k = {k} cells a side; got {len(real)} and {len(generated)}")
    real, generated = np.asarray(real, dtype=np.float64), np.asarray(generated, dtype=np.float64)
    real_radius2, generated_radius2 = _radius2(real, k), _radius2(generated, k)
    inside_real = np.zeros(len(generated), dtype=np.int64)  # real balls that hold the generated point
    recalled = np.zeros(len(real), dtype=bool)
    covered = np.zeros(len(real), dtype=bool)
    for rows, d2 in squared_distance_blocks(real, generated):
        in_ball = d2 < real_radius2[rows, None]
        inside_real += in_ball.sum(0)
        covered[rows] = in_ball.any(1)
        recalled[rows] = (d2 < generated_radius2).any(1)
    return Manifolds(
        precision=float((inside_real > 0).mean()),
        recall=float(recalled.mean()),
        density=float(inside_real.mean() / k),
        coverage=float(covered.mean()),
    )


def _radius2(x: np.ndarray, k: int) -> np.ndarray:
    """Return the squared distance of each point to its k-th nearest other point, (n,)."""
    return NearestNeighbors(n_neighbors=k).fit(x).kneighbors()[0][:, -1] ** 2
