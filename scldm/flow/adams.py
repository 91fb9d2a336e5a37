"""Adams-Bashforth: the slopes of earlier steps are used again, so that a step costs one evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from scldm.flow.runge_kutta import TABLEAUX, Solution, Velocity, combined, stages_of, times_of

ORDER = 3


def solve_adams(velocity: Velocity, x0: Tensor, times: Sequence[float], *, order: int = ORDER) -> Solution:
    """Adams-Bashforth from x0 (b, ...) at times[0] to times[-1]: slopes of earlier steps are used again.

    One evaluation a step, and two more in the first, which is Heun's of third order. The polynomial goes through the
    last `order` slopes, or as many as there are. Steps need not be equal.
    """
    x = x0
    slopes: list[Tensor] = []
    known: list[float] = []
    for i, (t, t_next) in enumerate(pairwise(times)):
        if i == 0:
            stages = stages_of(velocity, x, t, t_next, TABLEAUX["heun3"])
            step = (t_next - t) * combined(TABLEAUX["heun3"].b, stages)
            slopes, known = [stages[0]], [t]
        else:
            slopes, known = [*slopes, velocity(x, times_of(x, t))][-order:], [*known, t][-order:]
            step = (t_next - t) * combined(_adams_weights(known, t, t_next), slopes)
        x = x + step
    return Solution(x=x, nfe=len(times) - 1 + 2)


def _adams_weights(known: Sequence[float], t: float, t_next: float) -> tuple[float, ...]:
    """Weights of the slopes at times `known`: their polynomial's mean over the step from t to t_next."""
    u = (np.array(known) - t) / (t_next - t)
    powers = np.arange(len(known))
    return tuple(np.linalg.solve(u[None] ** powers[:, None], 1 / (powers + 1)).tolist())
