"""Convert AnnData to the cell sets that metrics compare."""

from __future__ import annotations

from collections.abc import Sequence

from anndata import AnnData

from scldm.data.cell_counts import is_log_normalised
from scldm.data.class_names import class_names
from scldm.errors import InputError
from scldm.metrics.cell_set import CellSet
from scldm.metrics.genes import expression


class EvaluationError(InputError, ValueError):
    """Raised for cells or settings that cannot be evaluated. The message says what is wrong and what is needed."""


def cell_set(adata: AnnData, labels: Sequence[str]) -> CellSet:
    """Return the values (log1p CP10k if uns says so, else counts) and labels; a missing label value becomes None."""
    missing = [name for name in labels if name not in adata.obs]
    if missing:
        raise EvaluationError(f"obs lacks {', '.join(missing)}; it has {', '.join(adata.obs.columns) or 'no columns'}")
    classes = {n: class_names(adata.obs[n]) for n in labels}
    if is_log_normalised(adata.uns):
        return CellSet(expression.as_log_values(adata.X), classes, counted=False)
    return CellSet(expression.as_counts(adata.X), classes)
