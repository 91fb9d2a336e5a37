"""Convert AnnData to the cell sets that metrics compare."""

from __future__ import annotations

from collections.abc import Sequence

from anndata import AnnData

from scldm.data.class_names import class_names
from scldm.errors import InputError
from scldm.metrics.cell_set import CellSet
from scldm.metrics.genes import expression


class EvaluationError(InputError, ValueError):
    """Raised for cells or settings that cannot be evaluated. The message says what is wrong and what is needed."""


def cell_set(adata: AnnData, labels: Sequence[str]) -> CellSet:
    """Return the counts and labels of an AnnData; a missing label value becomes None."""
    missing = [name for name in labels if name not in adata.obs]
    if missing:
        raise EvaluationError(f"obs lacks {', '.join(missing)}; it has {', '.join(adata.obs.columns) or 'no columns'}")
    return CellSet(expression.as_counts(adata.X), {n: class_names(adata.obs[n]) for n in labels})
