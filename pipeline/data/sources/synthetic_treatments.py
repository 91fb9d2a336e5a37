"""Treatments of synthetic cells: effects that all types share in part, and what each combination has on average.

The effect of a treatment on log expression of a gene is a part that all types share plus a part that is linear in the
type's activity of the shared programmes. A prediction for a type that was never treated can thus use both: the mean
effect of the other types, and what the types have in common.

Shape letters: n cells, g genes, k types, t treatments without the control, p shared programmes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

TREATMENT, CONTROL = "treatment", "control"
SHARED_SD, OWN_SD = 0.9, 0.7  # of the effects on log expression of the genes that a treatment moves
MOVED_GENES = 0.15  # share of the genes that a treatment moves, of each part
TRUTH_CELLS = 4_000  # cells that the averages of a combination are taken over

Draw = Callable[[int, int, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def treatment_names(n_treatments: int) -> list[str]:
    """Return the classes of the column `treatment`; the control is the first."""
    return [CONTROL, *(f"treatment {i + 1}" for i in range(n_treatments))]


def given_treatments(types: np.ndarray, n_treatments: int, rng: np.random.Generator) -> np.ndarray:
    """Give each cell a treatment or the control, equally often within a type, (n,)."""
    given = np.zeros(len(types), np.int64)
    for kind in np.unique(types):
        members = np.flatnonzero(types == kind)
        given[members] = rng.permutation(np.arange(len(members)) % (n_treatments + 1))
    return given


def treatment_effects(state: np.ndarray, g: int, n_treatments: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the effects on log expression, (k, 1 + t, g); those of the control are 0.

    Args:
        state: Mean activity of the shared programmes in each type, (k, p).
        g: Number of genes.
        n_treatments: Treatments without the control.
        rng: Source of effects.
    """
    scale = np.sqrt(1 / 12) / 2  # standard deviation of activities, which are uniform on [0, 0.5]
    centred = (state - 0.25) / scale / np.sqrt(state.shape[1])
    effects = np.zeros((len(state), 1 + n_treatments, g))
    for t in range(n_treatments):
        moved = rng.random((2, g)) < MOVED_GENES
        shared = SHARED_SD * rng.normal(size=g) * moved[0]
        own = OWN_SD * rng.normal(size=(state.shape[1], g)) * moved[1]
        effects[:, 1 + t] = shared + centred @ own
    return effects


def combination_truth(
    draw: Draw,
    types: Sequence[str],
    n_treatments: int,
    genes: np.ndarray,
    stream: Callable[[int], np.random.Generator],
) -> pd.DataFrame:
    """Return the averages of every combination over many cells that are drawn for this alone.

    Args:
        draw: Draws cells of a type under a treatment: expected shares and counts, (n, g) each.
        types: Names of the types.
        n_treatments: Treatments without the control.
        genes: Ids of the genes, (g,).
        stream: Source of randomness of the i-th combination.

    Returns:
        A row for each combination and gene: cell_type, treatment, feature_id, share (of the gene in a cell), and
        mean_log (of log1p CP10k, what a mean over infinitely many measured cells would be).
    """
    parts = []
    pairs = [(k, t) for k in range(len(types)) for t in range(n_treatments + 1)]
    for i, (k, t) in enumerate(pairs):
        share, counts = draw(k, t, stream(i))
        log = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
        of_pair = {"share": share.mean(0), "mean_log": log.mean(0)}
        about = {"cell_type": types[k], TREATMENT: treatment_names(n_treatments)[t]}
        parts.append(pd.DataFrame({**about, "feature_id": genes, **of_pair}))
    return pd.concat(parts, ignore_index=True)
