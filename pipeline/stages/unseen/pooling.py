"""How cells are pooled: weights from measured combinations, and the shift of the mean that they give.

The same for cells of a perturb job and for combinations that predict_error leaves out.

Shape letters: n cells, g genes, k predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import scipy.sparse as sp

from scldm.generation.draws.change import Change
from scldm.metrics.perturbation.free_answers import Answer, free_answers
from scldm.metrics.perturbation.leave_out import askable
from scldm.metrics.perturbation.pooled import LEFT_OUT_CELLS, MOST_LEFT_OUT, learn_weights, predicted_shifts
from scldm.metrics.perturbation.screen import Combination, Screen

ChangeOf = Callable[[np.ndarray, Combination], Change]  # of cells (positions in the screen) that become a combination


def pool_weights(
    screen: Screen, change_of: ChangeOf, rng: np.random.Generator, *, asked: Collection[Combination] = ()
) -> tuple[np.ndarray, int]:
    """Return the weights of the predictions, (k,), and from how many measured combinations they are.

    Args:
        screen: Measured cells.
        change_of: Applies the models.
        rng: Draws combinations, cells and counts.
        asked: Combinations that are asked for; they are not used.
    """
    pairs = [pair for pair in askable(screen) if pair not in asked]
    predicted, measured = [], []
    for pair in [pairs[i] for i in rng.permutation(len(pairs))[:MOST_LEFT_OUT]]:
        some = rng.permutation(screen.members[pair[0], screen.control])[:LEFT_OUT_CELLS]
        flow = flow_shift(change_of(some, pair), rng)
        free = free_answers(screen.without([pair]), pair[0], pair[1], rng)
        predicted.append(predicted_shifts(free, flow))
        measured.append(screen.mean(*pair) - screen.mean(pair[0], screen.control))
    return learn_weights(predicted, measured), len(measured)


def pooled_shift(
    screen: Screen, pair: Combination, change: Change, weights: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, Answer]]:
    """Return the pooled shift of a combination's mean log1p CP10k, (g,), and the free answers in it.

    Args:
        screen: Measured cells; those of the combination are not used.
        pair: Context and treatment.
        change: Of the control cells that are moved: they are the context's controls for the free answers too.
        weights: Of the predictions, (k,).
        rng: Draws counts.
    """
    flow = flow_shift(change, rng)
    free = free_answers(screen.with_controls(pair[0], sp.csr_matrix(change.counts)).without([pair]), *pair, rng)
    return weights @ predicted_shifts(free, flow), free


def flow_shift(change: Change, rng: np.random.Generator) -> np.ndarray:
    """Return how the flow changes the mean log1p CP10k of cells, (g,)."""
    from scldm.generation.draws.matched_mean import draw_changed
    from scldm.metrics.genes.expression import log1p_cp10k

    moved = sp.csr_matrix(draw_changed(change, rng))
    return np.asarray(log1p_cp10k(moved).mean(0) - log1p_cp10k(sp.csr_matrix(change.counts)).mean(0)).ravel()
