"""Cells of two types with their own halves of the genes, for tests of metrics."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from scldm.metrics.cell_set import CellSet
from scldm.metrics.compare import CompareSettings, Comparison
from scldm.metrics.conditional import ConditionalSettings
from scldm.metrics.distribution.projection import RealSpace

N_GENES = 40


def cells(n: int, seed: int, *, scale: float = 1.0) -> CellSet:
    """Two types; each has its own half of the genes high. `scale` multiplies five genes of middling expression."""
    rng = np.random.default_rng(seed)
    types = np.arange(n) % 2
    rate = np.where((np.arange(N_GENES) % 2) == types[:, None], 6.0, 1.0) * np.linspace(0.2, 2, N_GENES)
    rate[:, 20:25] *= scale
    labels = np.array(["even", "odd"], dtype=object)[types]
    return CellSet(sp.csr_matrix(rng.poisson(rate * rng.lognormal(0, 0.3, (n, 1)))), {"type": labels})


def settings(**changes) -> CompareSettings:
    conditional = ConditionalSettings(
        min_cells=changes.pop("min_cells", 20), transport_cells=150, average=changes.pop("average", "cells"),
        control=changes.pop("control", {}),
    )  # fmt: skip
    return CompareSettings(
        n_neighbors=5, transport_cells=150, seed=0, conditional=conditional, resamples=20, refits=5, **changes
    )


def comparison(real: CellSet, reference: CellSet, labels=("type",), **changes) -> Comparison:
    space = RealSpace.fit(reference.counts, n_top_genes=30, n_pcs=5, seed=0)
    return Comparison(real, reference, space, settings(**changes), labels=labels)
