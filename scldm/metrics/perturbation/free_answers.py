"""What is known for free about a combination that was not measured: from controls, and from other contexts.

Every answer is cells, so that all measures apply to it, and uses no cell of the combination:

    control           the context's control cells, as they are
    shift             control cells + the mean shift of the other contexts, in log1p CP10k (a mean without noise)
    shift in counts   the same shift, drawn as counts: molecules are added, or lost one by one
    nearest context   the treated cells of the context whose controls are nearest
    additive NB       profile of the control × mean ratio of the other contexts; negative binomial counts
    linear            control cells + the shift that a linear model on pseudobulks predicts from the control's profile

A model is worth its cost where it is nearer to the measured cells than all of these.

Source: the baselines of PerturBench (arXiv 2408.10609) and of the linear models there; the shift in counts is ours.

Shape letters: k cells of an answer, g genes, c contexts, p components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from scldm.metrics.baselines import LabelBaseline
from scldm.metrics.genes.expression import as_counts, library_sizes, log1p_cp10k
from scldm.metrics.perturbation.screen import Screen
from scldm.metrics.perturbation.shift import PSEUDO, CountShift, shares

CONTROL, SHIFT, COUNTS, NEAREST, NB, LINEAR = (
    "control",
    "shift",
    "shift in counts",
    "nearest context",
    "additive NB",
    "linear",
)
FREE_ANSWERS = (CONTROL, SHIFT, COUNTS, NEAREST, NB, LINEAR)
COMPONENTS, RIDGE = 3, 1.0  # of the linear model: components of the controls' profiles, and its penalty
FARTHEST = 2.0  # standard deviations of a component: farther out the linear model does not extrapolate


@dataclass(frozen=True)
class Answer:
    """Cells that somebody says a combination has: log1p CP10k values, and counts if the answer has them."""

    log: np.ndarray  # (k, g)
    counts: sp.csr_matrix | None = None  # (k, g)

    @classmethod
    def of(cls, counts: sp.csr_matrix) -> Answer:
        """Return an answer of counts."""
        return cls(log1p_cp10k(counts).toarray(), sp.csr_matrix(counts))


def free_answers(screen: Screen, context: str, treatment: str, rng: np.random.Generator) -> dict[str, Answer]:
    """Return every free answer for a combination, by name.

    Args:
        screen: Measured cells without those of the combination.
        context: The combination's context.
        treatment: The combination's treatment.
        rng: Source of counts.

    Raises:
        InputError: The context has no control cells, or no other context has both the treatment and the control.
    """
    if (context, treatment) in screen.members:
        raise ValueError(f"{context} + {treatment} is among the measured cells: an answer would know the question")
    control = screen.cells(context, screen.control)
    change = CountShift.learn(screen, context, treatment)
    sources = list(change.sources)
    log = log1p_cp10k(control).toarray()
    shifts = np.stack([screen.mean(c, treatment) - screen.mean(c, screen.control) for c in sources])
    return {
        CONTROL: Answer(log, control),
        SHIFT: Answer(np.maximum(log + shifts.mean(0), 0)),
        COUNTS: Answer.of(change.apply(control, rng)),
        NEAREST: Answer.of(screen.cells(_nearest(screen, context, sources), treatment)),
        NB: Answer.of(_additive_nb(screen, control, sources, treatment, rng)),
        LINEAR: Answer(np.maximum(log + _linear(screen, context, sources, shifts), 0)),
    }


def _nearest(screen: Screen, context: str, sources: list[str]) -> str:
    own = screen.mean(context, screen.control)
    distances = [np.linalg.norm(screen.mean(c, screen.control) - own) for c in sources]
    return sources[int(np.argmin(distances))]


def _additive_nb(
    screen: Screen, control: sp.csr_matrix, sources: list[str], treatment: str, rng: np.random.Generator
) -> sp.csr_matrix:
    """Draw cells of the control's profile times the mean ratio; theta and library sizes are those of the controls."""
    base = LabelBaseline.fit(control, np.full(control.shape[0], "control"))
    own = base.table["control"]
    ratios = [
        np.log((shares(screen, c, treatment) + PSEUDO) / (shares(screen, c, screen.control) + PSEUDO)) for c in sources
    ]
    profile = own.profile * np.exp(np.mean(ratios, axis=0))
    changed = LabelBaseline({"control": type(own)(own.library_size, profile / profile.sum(), own.theta), "": own})
    return changed.negative_binomial(np.full(control.shape[0], "control"), rng, library_sizes(as_counts(control)))


def _linear(screen: Screen, context: str, sources: list[str], shifts: np.ndarray) -> np.ndarray:
    """Predict the shift, (g,), from the components of the control's profile: ridge regression over contexts."""
    profiles = np.stack([screen.mean(c, screen.control) for c in sources])  # (c, g)
    centre, mean_shift = profiles.mean(0), shifts.mean(0)
    u, s, v = np.linalg.svd(profiles - centre, full_matrices=False)
    p = int(min(COMPONENTS, (s > 1e-8).sum()))
    if not p:
        return mean_shift
    scale = s[:p] / np.sqrt(len(sources))
    x = u[:, :p] * np.sqrt(len(sources))  # (c, p), of unit variance
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(p), x.T @ (shifts - mean_shift))  # (p, g)
    own = np.clip((screen.mean(context, screen.control) - centre) @ v[:p].T / scale, -FARTHEST, FARTHEST)
    return mean_shift + own @ weights
