"""Label agreement: do classifiers trained on real cells recognise the requested label?

k nearest neighbours can follow any shape of a class; logistic regression separates halfspaces and is less affected by a
few stray neighbours. The ceiling is the same number on held-out real cells; well above it, generated cells are more
typical than real ones. Space: PCA of log1p CP10k fitted on real. Source: CFGen, scDiffusion (label agreement).

Shape letters: n cells, p coordinates, k classes, r resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scldm.errors import extra
from scldm.metrics.score import Score

with extra("score"):
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

KINDS = {"kNN": "label", "logistic": "label_logistic"}  # classifier -> prefix of its scores


@dataclass(frozen=True)
class LabelAgreement:
    """Accuracy of a classifier trained on real cells, with its confusion matrix."""

    accuracy: float
    macro_accuracy: float  # mean over classes of the share of cells classified correctly
    chance: float  # share of the most frequent class among the scored cells
    per_class: dict[str, float]
    n_cells: int
    n_unlabelled: int  # not scored
    classes: tuple[str, ...]
    confusion: np.ndarray  # (true class, predicted class), cells


def label_agreement(
    train: np.ndarray, train_labels: np.ndarray, points: np.ndarray, labels: np.ndarray, *, n_neighbors: int
) -> LabelAgreement:
    """Score a k-nearest-neighbour classifier trained on real cells on `points` (generated or held out).

    Higher is better. Majority vote, Euclidean. Cells without a label (None) are left out and counted.
    """
    given = labelled(labels)
    model = knn(train, train_labels, n_neighbors)
    if not given.any():
        raise ValueError("label agreement needs at least one labelled cell to score; got 0")
    return agreement(labels, model.predict(points[given]))


def knn(train: np.ndarray, train_labels: np.ndarray, n_neighbors: int) -> KNeighborsClassifier:
    """Fit a k-nearest-neighbour classifier to the labelled training cells."""
    known = labelled(train_labels)
    if known.sum() < n_neighbors:
        raise ValueError(
            f"label agreement needs at least {n_neighbors} labelled training cells; got {int(known.sum())}"
        )
    return KNeighborsClassifier(n_neighbors=n_neighbors).fit(train[known], train_labels[known].astype(str))


def logistic(train: np.ndarray, train_labels: np.ndarray) -> Any:
    """Fit multinomial logistic regression to standardised coordinates, L2 with C = 1."""
    known = labelled(train_labels)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    return model.fit(train[known], train_labels[known].astype(str))


def agreement(labels: np.ndarray, predicted: np.ndarray) -> LabelAgreement:
    """Compare the labels (n,), None if missing, with a classifier's predictions for the labelled cells."""
    given = labelled(labels)
    truth = labels[given].astype(str)
    classes = tuple(sorted({*predicted.tolist(), *truth.tolist()}))
    index = {c: i for i, c in enumerate(classes)}
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, ([index[t] for t in truth], [index[p] for p in predicted]), 1)
    per_class = {c: float(confusion[i, i] / confusion[i].sum()) for c, i in index.items() if confusion[i].any()}
    return LabelAgreement(
        accuracy=float((truth == predicted).mean()),
        macro_accuracy=float(np.mean(list(per_class.values()))),
        chance=float(confusion.sum(1).max() / confusion.sum()),
        per_class=per_class,
        n_cells=int(given.sum()),
        n_unlabelled=int((~given).sum()),
        classes=classes,
        confusion=confusion,
    )


def labelled(labels: np.ndarray) -> np.ndarray:
    """Return which cells have a label, (n,) bool."""
    return np.array([isinstance(v, str) for v in labels], dtype=bool)


class LabelJudges:
    """Classifiers of every label that real training cells have; fitted once, then applied to every set of cells.

    Args:
        points: Real training cells, (n, p).
        labels: Label -> class names or None, (n,). One with fewer than two classes has no logistic regression.
        n_neighbors: Neighbours of the kNN classifiers.
    """

    def __init__(self, points: np.ndarray, labels: Mapping[str, np.ndarray], *, n_neighbors: int):
        self.models: dict[str, dict[str, Any]] = {}
        for name, values in labels.items():
            if not labelled(values).any():
                continue
            self.models[name] = {"kNN": knn(points, values, n_neighbors)}
            if len(set(values[labelled(values)])) > 1:
                self.models[name]["logistic"] = logistic(points, values)

    def agreements(
        self, points: np.ndarray, labels: Mapping[str, np.ndarray], kind: str = "kNN"
    ) -> dict[str, LabelAgreement]:
        """Return the agreement for each label that both the training cells and these cells have."""
        out = {}
        for name, values in labels.items():
            model = self.models.get(name, {}).get(kind)
            if model is not None and labelled(values).any():
                out[name] = agreement(values, model.predict(points[labelled(values)]))
        return out

    def scores(
        self, points: np.ndarray, labels: Mapping[str, np.ndarray], weights: np.ndarray | None = None
    ) -> dict[str, Score]:
        """Return `label_accuracy.<label>`, `label_macro_accuracy.<label>` and `label_recall.<label>.<class>`.

        Scores of logistic regression are named `label_logistic_*` (no recalls). A label that no cell has is absent.

        Args:
            points: Cells to score, (n, p).
            labels: Label -> class names or None, (n,).
            weights: Resamples of the cells, (r, n). The classifiers are not refitted, so the interval covers the choice
                of the scored cells, not of the training cells.
        """
        out: dict[str, Score] = {}
        for name, values in labels.items():
            given = labelled(values)
            for kind, model in self.models.get(name, {}).items() if given.any() else ():
                truth, predicted = values[given].astype(str), model.predict(points[given])
                own = None if weights is None else weights[:, given]
                out |= _scores(name, kind, truth, truth == predicted, own)
        return out


def _scores(name: str, kind: str, truth: np.ndarray, right: np.ndarray, weights: np.ndarray | None) -> dict[str, Score]:
    def score(value: float, replicates: np.ndarray | None, title: str) -> Score:
        return Score(value, "higher", 1.0, "label", title, replicates, (0.0, 1.0))

    classes, codes = np.unique(truth, return_inverse=True)
    member = np.eye(len(classes))[codes]  # (n, k)
    recall = (right @ member) / member.sum(0)
    accuracies = macros = recalls = None
    if weights is not None:
        accuracies = weights @ right / weights.sum(1)
        mass = weights @ member
        # A class of one cell is in half of the halves: otherwise the mean is over the classes that are present.
        recalls = np.divide(weights @ (member * right[:, None]), mass, out=np.full_like(mass, np.nan), where=mass > 0)
        present = mass > 0
        macros = np.where(present, np.nan_to_num(recalls), 0).sum(1) / present.sum(1)
    prefix = KINDS[kind]
    out = {
        f"{prefix}_accuracy.{name}": score(float(right.mean()), accuracies, f"{name}: {kind} accuracy"),
        f"{prefix}_macro_accuracy.{name}": score(float(recall.mean()), macros, f"{name}: {kind} macro accuracy"),
    }
    if kind != "kNN":
        return out
    for i, class_name in enumerate(classes):
        own = None if recalls is None or np.isnan(recalls[:, i]).any() else recalls[:, i]
        out[f"label_recall.{name}.{class_name}"] = score(float(recall[i]), own, f"{name} = {class_name}")
    return out
