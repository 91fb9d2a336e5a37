"""What is known near a combination that nobody measured, in a few numbers that need none of its cells.

    context_distance     distance of the context's mean control cell to that of the nearest context with the treatment
    n_sources            log of the number of such contexts
    strength             log of the size of the mean shift in them
    agreement            mean correlation of their shifts, two by two; NaN of a single one
    methods, seeds, guidance, free   log of the distance between predicted means, relative to the strength

The last four are of predictions: cells from noise, carried over from controls, and shifted; of different seeds of the
training; with guidance 1 and 2; and of the free answers that `method: pooled` averages.

Beside them stands which context and which treatment it is (`indicators`): errors of one treatment resemble each other.
In a ridge regression that is a random effect of each.

Shape letters: g genes, k predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from scldm.metrics.perturbation.measures import pearson
from scldm.metrics.perturbation.screen import Combination, Screen

FEATURES = ("context_distance", "n_sources", "strength", "agreement", "methods", "seeds", "guidance", "free")
SMALL = 1e-9


def nearness(screen: Screen, context: str, treatment: str) -> dict[str, float]:
    """Return the numbers that need measured cells of other combinations only.

    Raises:
        ValueError: The treatment was measured in no other context.
    """
    sources = screen.sources(context, treatment)
    if not sources:
        raise ValueError(f"{treatment} has no other context than {context}")
    own = screen.mean(context, screen.control)
    controls = [screen.mean(c, screen.control) for c in sources]
    shifts = [screen.mean(c, treatment) - control for c, control in zip(sources, controls, strict=True)]
    alike = [pearson(a, b) for a, b in combinations(shifts, 2)]
    return {
        "context_distance": float(min(np.linalg.norm(c - own) for c in controls)),
        "n_sources": float(np.log(len(sources))),
        "strength": float(np.log(np.linalg.norm(np.mean(shifts, axis=0)) + SMALL)),
        "agreement": float(np.mean(alike)) if alike else float("nan"),
    }


def disagreement(means: Sequence[np.ndarray], strength: float) -> float:
    """Return the log of the mean distance between predicted means, two by two, relative to the strength.

    Args:
        means: Predicted means of log1p CP10k, (g,) each; of fewer than two nothing is known, and NaN is returned.
        strength: Log of the size of the mean shift in other contexts.
    """
    apart = [float(np.linalg.norm(a - b)) for a, b in combinations(means, 2)]
    return float(np.log(np.mean(apart) + SMALL) - strength) if apart else float("nan")


def indicators(pairs: Sequence[Combination], known: Sequence[Combination]) -> np.ndarray:
    """Return which context and treatment combinations have, 1 or 0, (n, p).

    Args:
        pairs: The combinations.
        known: Combinations with known errors; there is a column for each of their contexts and treatments, if there are
            several. One that none of them has is 0 in all columns.
    """
    columns = []
    for of in range(2):
        names = sorted({pair[of] for pair in known})
        columns += [[float(pair[of] == name) for pair in pairs] for name in names if len(names) > 1]
    return np.array(columns).reshape(len(columns), len(pairs)).T


def as_features(numbers: Mapping[str, float]) -> np.ndarray:
    """Return the numbers in the order of FEATURES, (p,); NaN for those that are not known."""
    return np.array([numbers.get(name, np.nan) for name in FEATURES])
