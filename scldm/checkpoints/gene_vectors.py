"""Embeddings of genes that a model lacks, predicted from vectors that the user has for genes (ESM, GenePT, any other).

A ridge regression from vectors to embeddings is fitted to the genes that the model knows; its penalty is the one of the
smallest leave-one-out error. If vectors explain nothing of these embeddings, a new gene starts at their mean, as it
does without vectors.

Shape letters: k genes with a vector and an embedding, m new genes, p width of the vectors, d width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scldm.data.labels.read_vectors import read_named_vectors
from scldm.errors import InputError

MIN_GENES = 10  # known genes with a vector; a regression on fewer says nothing
PENALTIES = np.geomspace(1e-3, 1e3, 13)  # relative to the mean variance of the vectors' components
SHOWN = 5
ID = "feature_id"


@dataclass(frozen=True)
class GeneVectors:
    """One vector for each of some genes."""

    ids: tuple[str, ...]
    values: np.ndarray  # (k, p) float64

    def of(self, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the genes have a vector, bool (n,), and the vectors of those, (k, p)."""
        at = {name: i for i, name in enumerate(self.ids)}
        places = np.array([at.get(name, -1) for name in ids], dtype=np.int64)
        return places >= 0, self.values[places[places >= 0]]


@dataclass(frozen=True)
class Predicted:
    """Embeddings of new genes."""

    known: np.ndarray  # bool (n,): the new genes that have a vector
    values: np.ndarray  # (m, d), of those
    explained: float  # share of the variance of known embeddings that is predicted, leaving one gene out


def read_gene_vectors(path: Path, setting: str) -> GeneVectors:
    """Read a table: gene ids in the column `feature_id`, in the first column or in the index; all others are numbers.

    Raises:
        InputError: It is no such table; all that is wrong with it is said.
    """
    found = read_named_vectors(path, setting, column=ID, ids="gene ids", things="genes")
    return GeneVectors(found.names, found.values)


def predict_embeddings(
    vectors: GeneVectors, old_ids: Sequence[str], old: np.ndarray, new_ids: Sequence[str]
) -> Predicted:
    """Predict the embeddings of new genes.

    Args:
        vectors: Vectors of old and new genes.
        old_ids: Ids of the genes that the model knows.
        old: Their embeddings, (n, d).
        new_ids: Ids of the genes that it lacks.

    Raises:
        InputError: No new gene has a vector, or fewer than MIN_GENES of the model's genes have one.
    """
    known, x = vectors.of(old_ids)
    asked, new = vectors.of(new_ids)
    if not asked.any():
        raise InputError(
            f"none of the {len(new_ids)} new genes ({', '.join(new_ids[:SHOWN])}) has a vector; the table's first "
            f"genes are {', '.join(vectors.ids[:SHOWN])}"
        )
    if known.sum() < MIN_GENES:
        raise InputError(
            f"{int(known.sum())} genes of the model have a vector, and at least {MIN_GENES} are needed to relate "
            f"vectors to embeddings; the table's first genes are {', '.join(vectors.ids[:SHOWN])}"
        )
    y = np.asarray(old, dtype=np.float64)[known]
    centre, mean = x.mean(0), y.mean(0)
    weights, explained = _ridge(x - centre, y - mean)
    return Predicted(asked, mean + (new - centre) @ weights, explained)


def _ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the weights (p, d) of the best penalty, and the share of y that it explains, leaving one row out.

    x and y have mean 0. With x = U S V', the prediction of penalty a is H y with H = U diag(s² / (s² + a)) U' + 1 / k
    (the mean), and the error of row i, had it been left out, is that of the fit over 1 - H_ii.
    """
    k, p = x.shape
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    total = float(((y / (1 - 1 / k)) ** 2).sum())  # of the mean of the others
    best, explained = np.zeros((p, y.shape[1])), 0.0
    if not total:
        return best, explained
    for penalty in PENALTIES * float((s**2).sum()) / p:
        shrunk = s**2 / (s**2 + penalty)
        leverage = (u**2) @ shrunk + 1 / k
        error = (y - u @ (shrunk[:, None] * (u.T @ y))) / np.maximum(1 - leverage, 1e-9)[:, None]
        if (share := 1 - float((error**2).sum()) / total) > explained:
            best, explained = vt.T @ ((s / (s**2 + penalty))[:, None] * (u.T @ y)), share
    return best, explained
