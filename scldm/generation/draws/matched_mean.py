"""Move cells to another condition with a mean that is given: factors of the genes for `change_counts`.

A flow says how each cell changes, other predictions only how the mean of all cells does, often with less error. So the
flow's means after the change are multiplied by one factor per gene, for which the mean of log1p CP10k over the changed
cells is the one that is asked for; what distinguishes the cells from each other stays the flow's.

The mean of log1p of counts that are drawn has no closed form. It is found by steps of Newton's method on draws, whose
noise is averaged out over the last steps (Robbins and Monro 1951, Polyak and Juditsky 1992).

Shape letters: b cells, g genes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from scldm.generation.draws.change import Change

STEPS, AVERAGED = 14, 6  # Newton steps, and how many of the last are averaged
LARGEST = 6.0  # |log factor|; a gene that no control cell expresses has no better bound
LARGEST_STEP = 1.5
LEAST_SLOPE = 0.02  # of the mean of log1p CP10k in the log factor: below it, counts say nothing of the gene
ROWS = 64  # cells that are dense at a time
PER_CELL = 1e4


def matched_factors(change: Change, shift: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the factor of each gene's mean after the change, (g,), positive.

    Args:
        change: Of some cells; a few hundred are enough.
        shift: What the mean of log1p CP10k has to change by, (g,). A shift that no factor reaches, such as below a mean
            of 0, is reached as nearly as `LARGEST` allows.
        rng: Source of the draws.

    Raises:
        ValueError: The shift has another number of genes, or there are no cells.
    """
    if shift.shape != change.counts.shape[1:] or not len(change.counts):
        raise ValueError(f"counts {change.counts.shape} and shift {shift.shape} do not fit")
    target = _mean_log(replace(change, after=change.before), rng)[0] + shift
    log_factor, found = np.zeros(len(shift)), []
    for step in range(STEPS):
        mean, slope = _mean_log(change.times(np.exp(log_factor)), rng)
        damping = 0.8 if step < STEPS - AVERAGED else 0.4
        newton = damping * (target - mean) / np.maximum(slope, LEAST_SLOPE)
        log_factor = np.clip(log_factor + np.clip(newton, -LARGEST_STEP, LARGEST_STEP), -LARGEST, LARGEST)
        found.append(log_factor)
    return np.exp(np.mean(found[-AVERAGED:], axis=0))


def draw_changed(change: Change, rng: np.random.Generator) -> np.ndarray:
    """Draw counts (b, g) after a change of their means: the plain form of `changed_counts.change_counts`."""
    kept = rng.binomial(change.counts.astype(np.int64), change.kept_share)
    gain = change.gain
    rises = gain > 0
    shape = (change.theta + change.counts)[rises]
    spread = np.isfinite(shape)
    rate = gain[rises]
    rate[spread] *= rng.standard_gamma(shape[spread]) / shape[spread]
    kept[rises] += rng.poisson(rate)
    return kept


def _mean_log(change: Change, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean log1p CP10k of changed cells, and its slope in the log factor, both (g,)."""
    n, g = change.counts.shape
    mean, slope = np.zeros(g), np.zeros(g)
    for first in range(0, n, ROWS):
        part = change[first : first + ROWS]
        drawn = draw_changed(part, rng).astype(np.float64)
        scale = PER_CELL / np.maximum(drawn.sum(1, keepdims=True), 1)
        log = np.log1p(drawn * scale)
        mean += log.sum(0)
        # dE[f(y)] / d log r = r E[f(y + 1) - f(y)] for a Poisson of rate r, and nearly so for molecules that are kept.
        # The larger of both rates is taken: where the decoder expects more than was measured, a step across "no change"
        # meets the Poisson.
        rate = np.maximum(part.after * part.rate_of_counts, part.counts * part.kept_share)
        slope += (rate * (np.log1p((drawn + 1) * scale) - log)).sum(0)
    return mean / n, slope / n
