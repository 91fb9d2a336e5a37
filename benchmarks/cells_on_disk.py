"""Made-up cells on disk for the data benchmark: one SOMA experiment, written as the Census is, and the same cells as
h5ad shards.

What matters for speed is as in the Census: storage tiles of 2,048 cells, zstd, about 1,900 expressed genes a cell
(log-normal), gene popularity over four decades, counts mostly 1 with a long tail, cells of a type side by side. A
folder is a function of its sizes and of VERSION; one that is whole is used again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from pipeline.data.loading.blocks import SomaBlocks, SomaReader
from pipeline.data.soma.store import TILE, SomaStore
from pipeline.data.soma.write import write_experiment

VERSION = 1
MEAN_EXPRESSED, EXPRESSED_SD = 1900, 0.45  # genes of a cell, and the sd of their log
TABLE = 1 << 20  # steps of the inverse of the cumulated gene popularity
N_TYPES = 60
SHARD_CELLS = 4 * TILE


@dataclass(frozen=True)
class CellsOnDisk:
    """Where the cells are."""

    folder: Path
    n_cells: int
    n_genes: int

    @property
    def soma(self) -> Path:
        return self.folder / "soma"

    @property
    def shards(self) -> list[str]:
        return [str(self.folder / f"cells-{i:03d}.h5ad") for i in range(-(-self.n_cells // SHARD_CELLS))]

    def source(self, n_cells: int | None = None) -> SomaBlocks:
        """The first `n_cells` (all) as the trainer gets them: every gene in the vocabulary, one label."""
        ids = np.arange(self.n_cells if n_cells is None else n_cells)
        lut = np.arange(self.n_genes, dtype=np.int32)
        reader = SomaReader(str(self.soma), {}, "RNA", "raw", lut, ("cell_type",), "uint16", MEAN_EXPRESSED)
        return SomaBlocks(ids, {"cell_type": types_of(self.n_cells)[ids]}, TILE, reader)


def cells_on_disk(root: Path, *, n_cells: int, n_genes: int) -> CellsOnDisk:
    """Write the cells, or find them written."""
    cells = CellsOnDisk(root / f"cells-v{VERSION}-{n_cells}x{n_genes}", n_cells, n_genes)
    done = cells.folder / "done.json"
    if not done.is_file():
        shutil.rmtree(cells.folder, ignore_errors=True)
        cells.folder.mkdir(parents=True)
        obs = pd.DataFrame(
            {"cell_type": pd.Categorical.from_codes(types_of(n_cells), [f"type {i}" for i in range(N_TYPES)])}
        )
        names = [f"ENSG{i:011d}" for i in range(n_genes)]
        var = pd.DataFrame({"feature_id": names, "feature_name": names, "feature_length": 1000})
        write_experiment(cells.soma, obs, var, _and_shards(_chunks(n_cells, n_genes), cells, names))
        done.write_text(json.dumps({"nnz": int(SomaStore(str(cells.soma)).counts.nnz)}))
    return cells


def types_of(n_cells: int) -> np.ndarray:
    """Class ids of the cells, int32: sorted by type, as cells of one study lie together."""
    return (np.arange(n_cells) * N_TYPES // n_cells).astype(np.int32)


def _chunks(n_cells: int, n_genes: int) -> Iterator[sp.csr_matrix]:
    rng = np.random.default_rng(VERSION)
    cumulated = np.cumsum(
        np.minimum(rng.lognormal(0, 2.0, n_genes), 40.0)
    )  # the cap keeps one gene from filling a cell
    gene_at = np.searchsorted(cumulated / cumulated[-1], (np.arange(TABLE) + 0.5) / TABLE)
    tail = np.minimum(rng.pareto(1.6, TABLE) * 0.6, 5000).astype(np.int64)
    for start in range(0, n_cells, TILE):
        n = min(TILE, n_cells - start)
        mean = np.log(MEAN_EXPRESSED) - EXPRESSED_SD**2 / 2
        expressed = np.clip(rng.lognormal(mean, EXPRESSED_SD, n), 200, 8000).astype(np.int64)
        drawn = np.repeat(np.arange(n) * n_genes, expressed * 5 // 4)  # a gene drawn twice has count 2
        drawn += gene_at[rng.integers(0, TABLE, len(drawn))]
        entries, counts = np.unique(drawn, return_counts=True)
        counts = counts + tail[rng.integers(0, TABLE, len(entries))]
        indptr = np.searchsorted(entries, np.arange(n + 1) * n_genes)
        yield sp.csr_matrix((counts.astype(np.float32), (entries % n_genes).astype(np.int32), indptr), (n, n_genes))


def _and_shards(chunks: Iterator[sp.csr_matrix], cells: CellsOnDisk, names: list[str]) -> Iterator[sp.csr_matrix]:
    """Pass the chunks on, and write them as h5ad shards, uncompressed: the fastest to read back."""
    held: list[sp.csr_matrix] = []
    for i, chunk in enumerate(chunks):
        held.append(chunk)
        last = (i + 1) * TILE >= cells.n_cells
        if len(held) * TILE == SHARD_CELLS or last:
            shard = i * TILE // SHARD_CELLS
            obs = pd.DataFrame(index=(shard * SHARD_CELLS + np.arange(sum(c.shape[0] for c in held))).astype(str))
            counts = sp.vstack(held, format="csr")
            anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=names)).write_h5ad(cells.shards[shard])
            held = []
        yield chunk
