"""A score, how to read it, and how sure it is."""

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
Judgement = Literal["nearer", "farther", "not told apart"]


@dataclass(frozen=True)
class Score:
    """A value and how to read it."""

    value: float
    better: Literal["lower", "higher", "ideal"]  # "ideal": the nearer to `ideal`, the better
    ideal: float
    group: Group
    title: str
    replicates: np.ndarray | None = field(default=None, compare=False, repr=False)  # (r,) of halves; None: no interval
    bounds: tuple[float, float] = (-np.inf, np.inf)  # that the score cannot leave

    @property
    def half_width(self) -> float | None:
        return None if self.replicates is None or len(self.replicates) < 2 else half_width(self.replicates)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval, cut to the bounds; see `resampling`."""
        if (width := self.half_width) is None:
            return None
        low, high = self.bounds
        return max(self.value - width, low), min(self.value + width, high)


def checked(scores: Mapping[str, Score], of: str) -> dict[str, Score]:
    """The scores, all finite.

    Raises:
        FloatingPointError: a score or a resample of one is NaN or infinite; names all of them.
    """
    bad = [
        f"{name} is {s.value}" if not np.isfinite(s.value) else f"{name} is not finite in resamples"
        for name, s in scores.items()
        if not np.isfinite(s.value) or (s.replicates is not None and not np.isfinite(s.replicates).all())
    ]
    if bad:
        raise FloatingPointError(f"scores of {of} that are no numbers: {'; '.join(bad)}")
    return dict(scores)


def departure(score: Score, floor: Score) -> float:
    """Distance from the floor, to either side; 0 at best.

    Doing better than real against real is no merit: cells that are all typical have a lower W2, a higher precision and
    labels that are easier to recognise than real cells have.
    """
    return abs(score.value - floor.value)


def judge(score: Score, other: Score, floor: Score) -> Judgement | None:
    """Is `score` nearer to the floor than `other`, as far as the intervals allow to say?

    Of D = |score - floor| - |other - floor|: nearer if D + t sd(D) < 0, farther if D - t sd(D) > 0. Resample k is of
    the same half of the real cells in all three, so what these have in common cancels. None without resamples.
    """
    a, b, base = score.replicates, other.replicates, floor.replicates
    if a is None or b is None or base is None or min(len(a), len(b), len(base)) < 2:
        return None
    gap = departure(score, floor) - departure(other, floor)
    width = half_width(abs(a - base) - abs(b - base))
    return "nearer" if gap + width < 0 else "farther" if gap - width > 0 else "not told apart"


def at_floor(score: Score, floor: Score) -> bool | None:
    """Whether the interval of score - floor holds 0."""
    a, base = score.replicates, floor.replicates
    if a is None or base is None or min(len(a), len(base)) < 2:
        return None
    return departure(score, floor) <= half_width(a - base)
