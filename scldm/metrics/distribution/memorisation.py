"""Memorisation: are generated cells copies of training cells?

Distances between distributions cannot tell: copies of training cells are real cells and score like the floor.

d(c) is the distance of cell c to its nearest real training cell, in the PCA space. Held-out real cells show how near
a cell is that was not copied. Only the given training cells are searched: a copy of another one is not detected.
Source: nearest-neighbour tests of generative models (e.g. Meehan et al. 2020, data copying).

Shape letters: n cells, p coordinates, r resamples.
"""

from __future__ import annotations

import numpy as np

from scldm.errors import extra
from scldm.metrics.score import Score
from scldm.metrics.side import Side

with extra("score"):
    from sklearn.neighbors import NearestNeighbors

PERCENTILE = 1.0


class NearestTraining:
    """Finds distances to the nearest of the real training cells.

    Args:
        training: Real training cells, (n, p).
    """

    def __init__(self, training: np.ndarray):
        self.search = NearestNeighbors(n_neighbors=1).fit(training)

    def distances(self, points: np.ndarray) -> np.ndarray:
        """Return the distance of each point (n, p) to its nearest training cell, (n,)."""
        return self.search.kneighbors(points)[0][:, 0]

    def scores(
        self, real: np.ndarray, candidate: np.ndarray, real_side: Side, candidate_side: Side
    ) -> dict[str, Score]:
        """Score the distances d of the held-out real and of the candidate's cells."""
        halves = range(len(real_side.halves))
        pairs = [(real[real_side.halves.members(k)], candidate[candidate_side.halves.members(k)]) for k in halves]
        ratio = np.array([distance_ratio(a, b) for a, b in pairs])
        share = np.array([share_too_near(a, b) for a, b in pairs])
        return {
            "memorisation_ratio": Score(
                distance_ratio(real, candidate), "ideal", 1.0, "memorisation",
                "distance to the nearest training cell: median, over that of held-out real cells", ratio, (0.0, np.inf),
            ),
            "memorisation_share": Score(
                share_too_near(real, candidate), "ideal", PERCENTILE / 100, "memorisation",
                f"share nearer to a training cell than the nearest {PERCENTILE:g} % of held-out real cells", share,
                (0.0, 1.0),
            ),
        }  # fmt: skip


def distance_ratio(real: np.ndarray, candidate: np.ndarray) -> float:
    """Return median d(candidate) / median d(held-out real).

    1 is ideal; near 0 means copies; above 1 the cells are farther from the training cells than real ones.
    """
    median = float(np.median(real))
    if median == 0:
        raise ValueError(
            "half of the held-out cells are equal to a training cell in the space: the split leaks, and memorisation "
            "cannot be measured"
        )
    return float(np.median(candidate)) / median


def share_too_near(real: np.ndarray, candidate: np.ndarray) -> float:
    """Return the share of candidate cells with d up to the 1st percentile of held-out real cells. 0.01 is ideal."""
    return float((candidate <= np.percentile(real, PERCENTILE)).mean())
