"""Measured combinations that are left out of a screen, to learn how wrong answers for unmeasured ones are.

Shape letters: n cells, p coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scldm.metrics.perturbation.measures import distances
from scldm.metrics.perturbation.screen import MIN_CELLS, CellNumbers, Combination, Screen

FLOOR_CELLS = 100  # of each of two sets whose distance is the floor
NEAREST = 0.05  # least distance over the floor: the distance without bias may be negative by chance
FEWEST_CELLS = 20  # measured cells of a combination, and of its context's control, that an answer is scored with


def askable(screen: Screen | CellNumbers, fewest: int = FEWEST_CELLS) -> list[Combination]:
    """Return the measured combinations that could be asked for without their cells, in order of names.

    Args:
        screen: Measured cells, or how many there are.
        fewest: Cells of the combination and of its context's control at least; another context must have both.
    """
    numbers = _numbers(screen)
    n, control = numbers.n, numbers.control
    return [
        pair
        for pair in n
        if pair[1] != control
        and n[pair] >= fewest
        and n.get((pair[0], control), 0) >= fewest
        and numbers.sources(*pair)
    ]


def unmeasured(screen: Screen | CellNumbers) -> list[Combination]:
    """Return the combinations without cells of a context that has controls and a treatment that another one has."""
    numbers = _numbers(screen)
    n, control = numbers.n, numbers.control
    contexts = sorted({c for c, t in n if t == control})
    treatments = sorted({t for _, t in n if t != control})
    pairs = [(c, t) for c in contexts for t in treatments if (c, t) not in n]
    return [pair for pair in pairs if n[pair[0], control] >= MIN_CELLS and numbers.sources(*pair)]


def _numbers(screen: Screen | CellNumbers) -> CellNumbers:
    return screen.numbers if isinstance(screen, Screen) else screen


def folds(pairs: Sequence[Combination], most: int, rng: np.random.Generator) -> list[list[Combination]]:
    """Return combinations to leave out together: no treatment loses all its contexts.

    Args:
        pairs: Combinations that each keep a source without their own cells, see `askable`.
        most: Folds at most, and at least 2. With fewer than contexts of a treatment, several are left out at once, at
            most half of them, rounded up.
        rng: Draws which are left out together.
    """
    by_treatment: dict[str, list[Combination]] = {}
    for pair in pairs:
        by_treatment.setdefault(pair[1], []).append(pair)
    found: list[list[Combination]] = []
    for members in by_treatment.values():
        order = [members[i] for i in rng.permutation(len(members))]
        n = min(max(2, most), len(order))
        for k, part in enumerate(np.array_split(np.arange(len(order)), n)):
            while len(found) <= k:
                found.append([])
            found[k] += [order[i] for i in part]
    return found


def energy_over_floor(real: np.ndarray, answer: np.ndarray) -> float:
    """Return the energy distance of two sets of cells over that of two sets of FLOOR_CELLS measured cells.

    1: as near as 100 other cells of the combination are on average. Both are expectations of the usual statistic
    (Székely and Rizzo 2013) at 100 cells on each side, so that the value does not depend on how many were measured.

    Args:
        real: Measured cells, (n, p), at least two.
        answer: Cells of the answer, (m, p), at least two.
    """
    return over_floor(distances(real, answer)["energy"], real)


def over_floor(energy: float, real: np.ndarray) -> float:
    """Return the same of an energy distance without bias to measured cells (n, p)."""
    squares = (real**2).sum(1)
    d = np.sqrt(np.maximum(squares[:, None] + squares - 2 * real @ real.T, 0))
    floor = 2 * (d.sum() - np.trace(d)) / (len(real) * (len(real) - 1)) / FLOOR_CELLS
    return float(max((energy + floor) / floor, NEAREST))
