"""Compute statistics of all generated cells in one pass over their shards, in the memory of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import scipy.sparse as sp

from scldm.cells.cells import Cells
from scldm.data.cell_counts import is_log_normalised
from scldm.data.class_names import class_names
from scldm.metrics.cell_set import CellSet
from scldm.metrics.from_anndata import EvaluationError
from scldm.metrics.streaming import StreamedCells, composition_weights, stream

BATCH = 4096  # cells in memory at once


def stream_generated(cells: Cells, real: CellSet, labels: Sequence[str]) -> tuple[StreamedCells, list[str]]:
    """Return statistics of all generated cells, weighted to the composition of the held-out ones.


    Args:
        cells: Generated cells, opened lazily.
        real: Held-out cells.
        labels: obs columns; those that every generated cell has define the composition.

    Returns:
        The statistics, and the held-out classes of which no cell was generated.
    """
    columns = {name: class_names(cells.obs[name]) for name in labels if name in cells.obs}
    given = [name for name, values in columns.items() if all(isinstance(v, str) for v in values)]
    classes = CellSet(sp.csr_matrix((cells.n_obs, 0)), columns).crossed(given)
    if not set(classes) & set(real.crossed(given)):
        raise EvaluationError(
            f"no generated cell has a combination of {', '.join(given)} that a held-out cell has; evaluate another "
            "split, or generate the conditions of this one (generate.like)"
        )
    weights, missing = composition_weights(classes, real.crossed(given))
    counted = not is_log_normalised(cells.uns)
    batch = BATCH if counted else BATCH // 8  # every gene of a cell is stored
    return stream(_values(cells, batch), weights, counted=counted), missing


def _values(cells: Cells, batch: int) -> Iterator[sp.csr_matrix]:
    for start in range(0, cells.n_obs, batch):
        yield sp.csr_matrix(cells[start : start + batch].X)
