"""The mean shift of a combination that three predictions give together: a flow's, and two that are free.

Predictions of a mean err in different ways: a flow by what it did not learn, the mean shift of the other contexts by
what is this context's own, in log values where genes are strongly expressed and in ratios where they are not. Their
average errs less than each of them (Bates and Granger 1969); on the screens of `benchmarks/perturbation.py` it was
nearer to the measured mean than the mean shift in nearly all combinations.

Shape letters: n cells, g genes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scldm.metrics.perturbation.free_answers import CONTROL, NB, SHIFT, Answer

POOLED = (SHIFT, NB)  # free answers that are averaged with the flow's


def pooled_shift(free: Mapping[str, Answer], flow: np.ndarray) -> np.ndarray:
    """Return the average shift of the mean log1p CP10k, (g,).

    Args:
        free: Free answers for the combination, by name; see `free_answers`.
        flow: Shift that a flow predicts for the same control cells, (g,).
    """
    control = free[CONTROL].log.mean(0)
    return np.mean([*(free[name].log.mean(0) - control for name in POOLED), flow], axis=0)
