"""Score what is said of combinations that nobody trained on: answers beside each other, and the floor beside all.

The *floor* is one half of the measured cells of a combination against the other half: what an answer cannot beat at
that number of cells. Intervals are of the cells: measured, control and answered cells are drawn again with replacement.

Shape letters: n cells, g genes, p coordinates, r resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.genes.expression import log1p_cp10k
from scldm.metrics.genes.fold_change import log_fold_change
from scldm.metrics.perturbation.free_answers import Answer
from scldm.metrics.perturbation.measures import (
    Change,
    cosine,
    distances,
    pearson,
    ranks,
    resampled_energies,
    shift_scores,
)
from scldm.metrics.perturbation.screen import Combination, Screen

FLOOR = "floor"
RESAMPLES = 100
MOST_CELLS = 1_000  # of a side in distances and tests
MIN_CELLS = 10  # measured cells of a combination; fewer have no halves to speak of


@dataclass(frozen=True)
class Interval:
    """95 % of the resamples lie between the two."""

    low: float
    high: float


@dataclass(frozen=True)
class CombinationScores:
    """What the answers for one combination are worth."""

    context: str
    treatment: str
    n_measured: int
    n_control: int
    sources: tuple[str, ...]  # other contexts in which the treatment was measured
    scores: dict[str, dict[str, float]]  # answer, or FLOOR -> measure -> value
    intervals: dict[str, dict[str, Interval]]  # the same, of measures that are functions of means and distances
    changes: dict[str, Change]  # "measured" and every answer


class CombinationJudge:
    """Scores answers for held-out combinations.

    Args:
        known: Measured cells that may be trained on.
        held_out: Measured cells of the combinations that are asked for.
        space: Space of the distances.
        seed: Seed of subsamples, halves and resamples.
    """

    def __init__(self, known: Screen, held_out: Mapping[Combination, sp.csr_matrix], space: RealSpace, *, seed: int):
        self.known, self.held_out, self.space, self.seed = known, held_out, space, seed

    def score(self, pair: Combination, answers: Mapping[str, Answer]) -> CombinationScores:
        """Score every answer for a combination.

        Args:
            pair: Context and treatment.
            answers: Cells by the name of who gives them.

        Raises:
            InputError: The context has no control cells.
            ValueError: Fewer than MIN_CELLS measured cells.
        """
        rng = np.random.default_rng([self.seed, *map(ord, "".join(pair))])
        measured = log1p_cp10k(self.held_out[pair]).toarray()
        if len(measured) < MIN_CELLS:
            raise ValueError(f"{pair[0]} + {pair[1]}: {len(measured)} measured cells are fewer than {MIN_CELLS}")
        control = _some(log1p_cp10k(self.known.cells(pair[0], self.known.control)).toarray(), rng)
        half = np.array_split(rng.permutation(len(measured)), 2)
        sides = {name: (_some(measured, rng), _some(answer.log, rng)) for name, answer in answers.items()}
        sides[FLOOR] = (_some(measured[half[0]], rng), _some(measured[half[1]], rng))
        real = Change.of(_some(measured, rng), control)
        scores, intervals, changes = {}, {}, {"measured": real}
        others = self._measured_shifts(pair, measured)
        for name, (own, cells) in sides.items():
            changes[name] = change = Change.of(cells, control)
            against = Change.of(own, control) if name == FLOOR else real
            a, b = self._points(own), self._points(cells)
            scores[name] = shift_scores(against, change) | distances(a, b) | ranks(change.shift, others, pair[1])
            intervals[name] = _intervals(own, cells, control, (a, b), rng)
        sources = tuple(self.known.sources(*pair))
        return CombinationScores(*pair, len(measured), len(control), sources, scores, intervals, changes)

    def _measured_shifts(self, pair: Combination, measured: np.ndarray) -> dict[str, np.ndarray]:
        """Return the measured shift of every treatment in the context, held-out ones too."""
        base = self.known.mean(pair[0], self.known.control)
        shifts = {
            t: self.known.mean(c, t) - base
            for c, t in self.known.members
            if c == pair[0] and t not in (self.known.control, pair[1])
        }
        for (c, t), cells in self.held_out.items():
            if c == pair[0] and t != pair[1] and cells.shape[0]:
                shifts[t] = np.asarray(log1p_cp10k(cells).mean(0)).ravel() - base
        return shifts | {pair[1]: measured.mean(0) - base}

    def _points(self, log: np.ndarray) -> np.ndarray:
        return (log[:, self.space.genes] - self.space.mean) @ self.space.axes.T


def _some(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return at most MOST_CELLS cells, drawn without replacement."""
    return cells[np.sort(rng.permutation(len(cells))[:MOST_CELLS])]


def _intervals(
    own: np.ndarray,
    cells: np.ndarray,
    control: np.ndarray,
    points: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
) -> dict[str, Interval]:
    """Return the intervals of the measures that need no test of each gene."""
    weights = [_weights(len(x), rng) for x in (own, cells, control)]
    means = [w @ x for w, x in zip(weights, (own, cells, control), strict=True)]  # (r, g)
    levels = [w @ np.expm1(x) for w, x in zip(weights, (own, cells, control), strict=True)]
    shift = [m - means[2] for m in means[:2]]
    lfc = [log_fold_change(level, levels[2]) for level in levels[:2]]
    found: dict[str, list[float]] = {
        "delta_pearson": _each(pearson, *shift),
        "lfc_cosine": _each(cosine, *lfc),
        "mae": np.abs(means[0] - means[1]).mean(1).tolist(),
        "rmse": np.sqrt(((means[0] - means[1]) ** 2).mean(1)).tolist(),
        "energy": resampled_energies(*points, weights[0], weights[1]).tolist(),
    }
    return {name: Interval(*map(float, np.quantile(values, [0.025, 0.975]))) for name, values in found.items()}


def _weights(n: int, rng: np.random.Generator) -> np.ndarray:
    """Return the weights of cells drawn with replacement, (r, n); rows sum to 1."""
    return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n


def _each(f: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray) -> list[float]:
    return [f(x, y) for x, y in zip(a, b, strict=True)]
