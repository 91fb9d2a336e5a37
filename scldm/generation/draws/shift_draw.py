"""Draw the counts of cells after a shift that adds and removes molecules.

A gene that rises gains a Poisson number of molecules; of a gene that falls each molecule stays with a probability. This
is a change of means from 1 (`changed_counts`), so that a count is a function of (seed, streams, cell id, gene, count,
shift) and does not depend on other cells or genes.

Shape letters: b cells, g genes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from scldm.generation.draws.change import Change
from scldm.generation.draws.changed_counts import change_counts

STAYED, GAINED = 26, 27  # streams of a cell's randomness; those of other draws are in `real_cells` and `perturbed`


def shifted_counts(
    counts: sp.csr_matrix, added: np.ndarray, kept: np.ndarray, cell_ids: Sequence[int] | np.ndarray, *, seed: int
) -> sp.csr_matrix:
    """Return the counts of b cells after a shift, (b, g) CSR int32.

    Args:
        counts: Counts of the cells, (b, g).
        added: Expected molecules that are added for each count of the cell, (g,), >= 0.
        kept: Probability that a molecule stays, (g,); 1 where molecules are added.
        cell_ids: Ids that the cells' counters use, (b,), >= 0.

    Raises:
        ValueError: A gene both gains and loses molecules.
    """
    if ((added > 0) & (kept < 1)).any():
        raise ValueError("a gene either gains molecules (added > 0) or loses them (kept < 1), not both")
    x = np.rint(counts.toarray())
    after = kept + x.sum(1, keepdims=True) * added
    change = Change(x, np.ones_like(after), after, np.full((1, after.shape[1]), np.inf))
    return change_counts(change, cell_ids, seed=seed, kept_stream=STAYED, added_stream=GAINED)
