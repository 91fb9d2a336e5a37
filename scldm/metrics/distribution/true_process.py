"""Compare cells and a VAE with the process that synthetic cells were drawn from.

Held-out cells are a sample: their floor says how far one sample is from another. Of synthetic cells the process itself
is known, which gives two figures more.

* The negative log-likelihood of held-out counts, given what is true of each cell (its expected counts, and the
  dispersion of each gene). No model knows more of a cell, though a VAE sees the counts that it then scores.
* The Fréchet distance to many fresh cells of the process, with the labels of the held-out ones. The held-out cells have
  one too: it is what a perfect model of as many cells would have.

Shape letters: n held-out cells, f fresh cells, g genes, p coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.special import gammaln

from scldm.metrics.baselines import LabelBaseline
from scldm.metrics.cell_set import CellSet
from scldm.metrics.distribution.distances import frechet_gaussians, gaussian
from scldm.metrics.distribution.projection import RealSpace

PROCESS = "the process"  # name of the truth among the candidates


@dataclass(frozen=True)
class TrueProcess:
    """What is known of the held-out cells, and fresh cells."""

    expected: np.ndarray  # (n, g) expected counts of each held-out cell
    theta: np.ndarray  # (g,) inverse dispersion
    fresh: sp.csr_matrix  # (f, g) counts


@dataclass(frozen=True)
class TruthScores:
    """Two figures by candidate; lower is nearer to the process."""

    nll: dict[str, float]  # of held-out cells, nats summed over genes; the process itself is PROCESS
    frechet: dict[str, float]  # to the fresh cells
    n_fresh: int

    def as_plain(self) -> dict[str, dict[str, float]]:
        """Return the figures as plain data."""
        return {"nll": self.nll, "frechet": self.frechet}


def truth_scores(
    process: TrueProcess, held_out: CellSet, candidates: Mapping[str, CellSet], space: RealSpace, *,
    nll: Mapping[str, float], rows: np.ndarray,
) -> TruthScores:  # fmt: skip
    """Score candidates against the process.

    Args:
        process: What is known of the held-out cells.
        held_out: Held-out cells, (n, g).
        candidates: Cells by name, each (n, g) or nearly so: the distance of fewer cells is larger.
        space: Space of the distance.
        nll: Mean over the held-out cells `rows`, by name of a model.
        rows: Held-out cells that likelihoods are of.
    """
    own = nb_nll(held_out.counts[rows], process.expected[rows], process.theta)
    there = gaussian(space.project(process.fresh))
    frechet = {name: frechet_gaussians(*gaussian(space.place(cells)), *there) for name, cells in candidates.items()}
    return TruthScores({PROCESS: float(own.mean()), **nll}, frechet, process.fresh.shape[0])


def label_nll(fitted: LabelBaseline, classes: np.ndarray, counts: sp.csr_matrix) -> float:
    """Return the mean negative log-likelihood of cells under the NB of their class, at their library sizes.

    A gene that no training cell of the class expresses is given half a count in the class.

    Args:
        fitted: Profiles of the classes.
        classes: Class of each cell, (n,).
        counts: Counts, (n, g).
    """
    size = np.asarray(counts.sum(1)).ravel()
    found = np.empty(len(classes))
    for name in dict.fromkeys(classes):
        here, known = np.flatnonzero(classes == name), fitted.table[name]
        profile = np.maximum(known.profile, 0.5 / known.library_size.sum())
        found[here] = nb_nll(counts[here], profile * size[here, None], known.theta)
    return float(found.mean())


def nb_nll(counts: sp.csr_matrix, mu: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Return the negative log-likelihood of counts (n, g), nats summed over genes, (n,).

    Args:
        counts: Counts, (n, g).
        mu: Their means, > 0, (n, g).
        theta: Inverse dispersion of each gene, (g,); infinite: a Poisson.
    """
    x, t = counts.toarray().astype(np.float64), np.minimum(theta, 1e8)  # beyond, the same to rounding
    log_p = gammaln(x + t) - gammaln(t) - gammaln(x + 1) - t * np.log1p(mu / t) + x * (np.log(mu) - np.log(mu + t))
    return np.asarray(-log_p.sum(1))
