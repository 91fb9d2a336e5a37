"""The mean shift of a combination that several predictions give together: three that are free, and a flow's.

Predictions of a mean err in different ways: the mean shift of the other contexts by what is this context's own, in log
values where genes are strongly expressed and as a ratio where they are not; a linear model by its few contexts; a flow
by what it did not learn. A weighted average errs less than each of them (Bates and Granger 1969). Weights are found on
measured combinations: the free predictions are made without their cells, and the weights are those of least squares,
with a penalty towards equal ones (Breiman 1996, stacked regressions). They add up to 1: with fewer contexts the free
predictions err more, and a smaller sum would be learned from that. The flow has seen these combinations, so that its
error on them is too small; it gets as much as an equal share of the free ones, a third, at most.

Penalty and sum were chosen on three of the screens of `benchmarks/perturbation.py` (gbm, airway, synthetic).

Shape letters: g genes, k predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import minimize

from scldm.metrics.perturbation.free_answers import CONTROL, LINEAR, NB, SHIFT, Answer

POOLED = (SHIFT, NB, LINEAR)  # free answers; the flow's prediction comes after them
FLOW = "flow"
TOWARDS_EQUAL = 1.0  # penalty, as many left-out combinations as it is worth
MOST_LEFT_OUT, LEFT_OUT_CELLS = 8, 150  # combinations that weights are learned from, control cells of each


def predicted_shifts(free: Mapping[str, Answer], flow: np.ndarray) -> np.ndarray:
    """Return the predicted shifts of the mean log1p CP10k, (k, g): of POOLED, then of the flow.

    Args:
        free: Free answers for the combination, by name; see `free_answers`.
        flow: Shift that a flow predicts for the same control cells, (g,).
    """
    control = free[CONTROL].log.mean(0)
    return np.stack([*(free[name].log.mean(0) - control for name in POOLED), flow])


def learn_weights(predicted: Sequence[np.ndarray], measured: Sequence[np.ndarray]) -> np.ndarray:
    """Return the weights of predictions, (k,), not negative and with a sum of 1.

    Args:
        predicted: Shifts as of `predicted_shifts` for each left-out combination, (k, g).
        measured: Its measured shift, (g,). Combinations count the same, however strong their shifts are.

    Returns:
        Equal weights, if there is no left-out combination.
    """
    k = len(POOLED) + 1
    equal = np.full(k, 1 / k)
    sizes = [max(float(y @ y), 1e-12) for y in measured]
    if not sizes:
        return equal
    a = sum(np.asarray(x @ x.T / s) for x, s in zip(predicted, sizes, strict=True))
    b = sum(np.asarray(x @ y / s) for x, y, s in zip(predicted, measured, sizes, strict=True))
    penalty = TOWARDS_EQUAL * float(np.trace(a)) / k / len(sizes)

    def error(w: np.ndarray) -> float:
        return float(w @ a @ w - 2 * b @ w + penalty * ((w - equal) ** 2).sum())

    def slope(w: np.ndarray) -> np.ndarray:
        return 2 * (a @ w - b + penalty * (w - equal))

    bounds = [(0.0, 1.0)] * (k - 1) + [(0.0, 1 / (k - 1))]
    one = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(k)}
    found = minimize(error, equal, jac=slope, bounds=bounds, constraints=[one], method="SLSQP")
    return np.clip(found.x, 0, 1)
