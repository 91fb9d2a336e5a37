"""One streaming pass over counts: what ingest needs to know of cells and genes.

Shape letters: n cells, g genes of the vocabulary. Memory: one block, and a few numbers per cell and gene.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from pipeline.data.soma import SomaStore
from pipeline.stage import InputError

TILES_PER_READ = 2


@dataclass(frozen=True)
class CountStatistics:
    """Per cell for all cells; per gene over the training cells."""

    library_size: np.ndarray  # (n,) sum of counts over the vocabulary
    n_expressed: np.ndarray  # (n,) genes with a count
    gene_cells: np.ndarray  # (g,) training cells that express the gene
    gene_sum: np.ndarray  # (g,)
    gene_sum_squares: np.ndarray  # (g,)
    n_train: int | np.ndarray  # training cells; of each gene (g,) those that measured it, if not all did
    content: str  # hash of the counts that were read

    @property
    def mean(self) -> np.ndarray:
        return self.gene_sum / self.n_train

    @property
    def variance(self) -> np.ndarray:
        """Of counts over training cells, divided by n."""
        return np.maximum(self.gene_sum_squares / self.n_train - self.mean**2, 0)


def count_statistics(
    store: SomaStore, ids: np.ndarray, train: np.ndarray, gene_lut: np.ndarray, n_genes: int
) -> CountStatistics:
    """Read every cell once, by storage tiles.

    Args:
        ids: soma_joinids, sorted, (n,).
        train: Which cells gene statistics are taken from, bool (n,).
        gene_lut: var soma_joinid -> gene id, -1 for genes outside the vocabulary.
        n_genes: Genes of the vocabulary, some of which the source may lack.
    """
    g = n_genes
    library_size, n_expressed = np.zeros(len(ids)), np.zeros(len(ids), np.int64)
    gene_cells, gene_sum, gene_squares = np.zeros(g, np.int64), np.zeros(g), np.zeros(g)
    content = hashlib.sha256()
    group = ids // (store.tile * TILES_PER_READ)
    for part in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(group)) + 1):
        rows = store.read_ragged(ids[part], gene_lut)
        _require_counts(store, ids[part], rows.indptr, rows.counts)
        for values in (rows.indptr.astype(np.int64), rows.genes, rows.counts):
            content.update(np.ascontiguousarray(values).data)
        ends = np.concatenate([[0.0], np.cumsum(rows.counts, dtype=np.float64)])[rows.indptr]
        library_size[part], n_expressed[part] = np.diff(ends), np.diff(rows.indptr)
        of_train = np.repeat(train[part], np.diff(rows.indptr))
        genes, counts = rows.genes[of_train], rows.counts[of_train].astype(np.float64)
        gene_cells += np.bincount(genes, minlength=g)
        gene_sum += np.bincount(genes, counts, minlength=g)
        gene_squares += np.bincount(genes, counts**2, minlength=g)
    return CountStatistics(
        library_size, n_expressed, gene_cells, gene_sum, gene_squares, int(train.sum()), content.hexdigest()
    )


def _require_counts(store: SomaStore, ids: np.ndarray, indptr: np.ndarray, counts: np.ndarray) -> None:
    bad = ~((counts >= 0) & (counts == np.rint(counts)))
    if bad.any():
        k = int(np.argmax(bad))
        cell = ids[int(np.searchsorted(indptr, k, side="right")) - 1]
        raise InputError(
            f"{store.uri}: layer {store.layer!r} of {store.measurement!r} does not hold raw counts: cell {cell} has "
            f"the value {counts[k]:.6g}; name the layer of raw counts in ingest.source.layer"
        )
