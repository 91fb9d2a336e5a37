"""Scores: a value, its interpretation and its confidence interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from scldm.metrics.resampling import half_width

Group = Literal[
    "expression",
    "cells",
    "distance",
    "two-sample",
    "conditional",
    "label",
    "memorisation",
    "reconstruction",
    "streamed",
]
KEY_SCORES = (  # shown first, in this order
    *("w2", "mmd2", "frechet", "energy", "auroc", "gene_mean_r2", "gene_variance_r2", "zero_fraction_difference"),
    *("library_size_ks", "genes_per_cell_ks", "reconstruction_nll", "reconstruction_gene_pearson"),
)
KEY_PREFIXES = ("label_accuracy.",)
Judgement = Literal["nearer", "farther", "not told apart"]


@dataclass(frozen=True)
class Score:
    """A value, its direction and its resamples."""

    value: float
    better: Literal["lower", "higher", "ideal"]  # "ideal": nearer to `ideal` is better
    ideal: float
    group: Group
    title: str
    replicates: np.ndarray | None = field(default=None, compare=False, repr=False)  # (r,) of halves; None: no interval
    bounds: tuple[float, float] = (-np.inf, np.inf)  # possible range of the score

    @property
    def half_width(self) -> float | None:
        """Half the width of the 95 % interval; None without resamples."""
        return None if self.replicates is None or len(self.replicates) < 2 else half_width(self.replicates)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval, cut to the bounds; see `resampling`. None without resamples."""
        if (width := self.half_width) is None:
            return None
        low, high = self.bounds
        return max(self.value - width, low), min(self.value + width, high)


def checked(scores: Mapping[str, Score], name: str) -> dict[str, Score]:
    """Return the scores after checking that all are finite.

    Raises:
        FloatingPointError: A score or a resample of one is NaN or infinite; the message names all of them.
    """
    bad = [
        f"{key} is {s.value}" if not np.isfinite(s.value) else f"{key} is not finite in resamples"
        for key, s in scores.items()
        if not np.isfinite(s.value) or (s.replicates is not None and not np.isfinite(s.replicates).all())
    ]
    if bad:
        raise FloatingPointError(f"scores of {name} that are not finite: {'; '.join(bad)}")
    return dict(scores)


def departure(score: Score, floor: Score) -> float:
    """Return the distance from the floor, to either side; 0 at best.

    A score better than real against real is no merit: cells that are all typical have a lower W2, a higher precision
    and labels that are easier to recognise than those of real cells.
    """
    return abs(score.value - floor.value)


def judge(score: Score, other: Score, floor: Score) -> Judgement | None:
    """Return whether `score` is nearer to the floor than `other`, as far as the intervals allow to tell.

    None without resamples.

    With D = |score - floor| - |other - floor|: nearer if D + t sd < 0, farther if D - t sd > 0. sd is that of D over
    the resamples, with the signs that the differences have in the full sample (an absolute value near 0 would fold its
    spread); if a difference from the floor is within its own interval, both signs are tried and the larger sd is taken.
    Resample k uses the same half of the real cells in all three, so that their common part cancels.
    """
    a, b, base = score.replicates, other.replicates, floor.replicates
    if a is None or b is None or base is None or min(len(a), len(b), len(base)) < 2:
        return None
    gap = departure(score, floor) - departure(other, floor)
    width = max(half_width(i * (a - base) - j * (b - base)) for i in _signs(score, floor) for j in _signs(other, floor))
    return "nearer" if gap + width < 0 else "farther" if gap - width > 0 else "not told apart"


def _signs(score: Score, floor: Score) -> tuple[float, ...]:
    """Return the sign of score - floor, or both signs if it may be either."""
    return (1.0, -1.0) if at_floor(score, floor) else (float(np.sign(score.value - floor.value)),)


def at_floor(score: Score, floor: Score) -> bool | None:
    """Return whether the interval of score - floor contains 0; None without resamples."""
    a, base = score.replicates, floor.replicates
    if a is None or base is None or min(len(a), len(base)) < 2:
        return None
    return departure(score, floor) <= half_width(a - base)
