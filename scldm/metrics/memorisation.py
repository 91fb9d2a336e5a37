"""Are generated cells copies of training cells?

Distances of distributions cannot tell: copies of training cells are real cells and score as the floor does.

d(c) is the distance of cell c to its nearest real training cell, in the PCA space. Held-out real cells say how near a
cell gets that was not copied. Only the training cells that are given are searched: a copy of another one is not seen.
Source: nearest-neighbour tests of generative models (e.g. Meehan et al. 2020, data copying).

Shape letters: n cells, p coordinates, r resamples.
"""

from __future__ import annotations

import numpy as np
from sklearn.neighbors import NearestNeighbors

from scldm.metrics.score import Score
from scldm.metrics.side import Side

PERCENTILE = 1.0


class NearestTraining:
    """Distances to the nearest of the real training cells, (n, p)."""

    def __init__(self, training: np.ndarray):
        self.search = NearestNeighbors(n_neighbors=1).fit(training)

    def distances(self, points: np.ndarray) -> np.ndarray:
        return self.search.kneighbors(points)[0][:, 0]

    def scores(self, real: np.ndarray, made: np.ndarray, real_side: Side, made_side: Side) -> dict[str, Score]:
        """From d of the held-out real and of the candidate's cells."""
        halves = range(len(real_side.halves))
        pairs = [(real[real_side.halves.members(k)], made[made_side.halves.members(k)]) for k in halves]
        ratio = np.array([distance_ratio(a, b) for a, b in pairs])
        share = np.array([share_too_near(a, b) for a, b in pairs])
        return {
            "memorisation_ratio": Score(
                distance_ratio(real, made), "ideal", 1.0, "memorisation",
                "distance to the nearest training cell: median, over that of held-out real cells", ratio, (0.0, np.inf),
            ),
            "memorisation_share": Score(
                share_too_near(real, made), "ideal", PERCENTILE / 100, "memorisation",
                f"share nearer to a training cell than the nearest {PERCENTILE:g} % of held-out real cells", share,
                (0.0, 1.0),
            ),
        }  # fmt: skip


def distance_ratio(real: np.ndarray, made: np.ndarray) -> float:
    """median d(candidate) / median d(held-out real). 1 is ideal; near 0: copies; above 1: further from all training."""
    median = float(np.median(real))
    if median == 0:
        raise ValueError(
            "half of the held-out cells are equal to a training cell in the space: the split leaks, and no "
            "memorisation can be measured"
        )
    return float(np.median(made)) / median


def share_too_near(real: np.ndarray, made: np.ndarray) -> float:
    """Share of candidate cells with d up to the 1st percentile of d of held-out real cells. 0.01 is ideal."""
    return float((made <= np.percentile(real, PERCENTILE)).mean())
