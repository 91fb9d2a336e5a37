"""Cells in memory, for the training benchmark: a source of blocks that costs a slice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class MemoryCells:
    """A source of blocks."""

    table: pa.Table
    tile: int = 64

    @property
    def ids(self) -> np.ndarray:
        return np.arange(len(self.table), dtype=np.int64)

    def read(self, ids: np.ndarray) -> pa.Table:
        return self.table.take(pa.array(ids))


def make_cells(n: int, *, n_genes: int, expressed: int) -> MemoryCells:
    """Cells of `expressed` genes each, drawn uniformly, with small counts."""
    rng = np.random.default_rng(0)
    genes = np.stack([np.sort(rng.choice(n_genes, expressed, replace=False)) for _ in range(n)])
    counts = 1 + rng.poisson(1.0, genes.shape)
    offsets = pa.array(np.arange(0, n * expressed + 1, expressed, dtype=np.int32))
    return MemoryCells(pa.table({
        "soma_joinid": np.arange(n, dtype=np.int64),
        "gene": pa.ListArray.from_arrays(offsets, pa.array(genes.reshape(-1).astype(np.uint16))),
        "count": pa.ListArray.from_arrays(offsets, pa.array(counts.reshape(-1).astype(np.float32))),
        "library_size": counts.sum(1).astype(np.float64),
    }))  # fmt: skip
