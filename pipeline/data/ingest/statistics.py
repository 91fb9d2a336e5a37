"""Statistics of cells and genes in one streaming pass over the counts.

Cells are read once, by groups of storage tiles. Sums are kept in whole numbers and the groups lie on the tile grid, so
the result is the same to the bit however the groups are distributed over processes. Memory: one group, a few numbers
per cell and gene, and the counts of rare genes until it is known whether they are kept.

Shape letters: n cells, g genes of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.data.entries import CountEntries
from pipeline.data.parallel import cluster_is_up, each_in_order
from pipeline.data.soma.store import SomaStore
from scldm.errors import InputError

TILES_PER_READ = 2
READS_PER_TASK = 8
PARALLEL_CELLS = 100_000  # fewer are read faster here than by workers that still have to start
MAX_HELD = 20_000_000  # entries of rare genes, 16 bytes each


@dataclass(frozen=True)
class CountStatistics:
    """Statistics per cell for all cells, and per gene over the training cells."""

    library_size: np.ndarray  # (n,) sum of counts over the vocabulary
    n_expressed: np.ndarray  # (n,) genes with a count
    gene_cells: np.ndarray  # (g,) training cells that express the gene
    gene_sum: np.ndarray  # (g,)
    gene_sum_squares: np.ndarray  # (g,)
    n_train: int | np.ndarray  # training cells; of each gene (g,) those that measured it, if not all did
    content: str  # hash of the counts that were read

    @property
    def mean(self) -> np.ndarray:
        """Mean of counts over training cells, (g,)."""
        return self.gene_sum / self.n_train

    @property
    def variance(self) -> np.ndarray:
        """Variance of counts over training cells, divided by n, (g,)."""
        return np.maximum(self.gene_sum_squares / self.n_train - self.mean**2, 0)


def count_statistics(
    store: SomaStore,
    ids: np.ndarray,
    train: np.ndarray,
    gene_lut: np.ndarray,
    n_genes: int,
    *,
    min_cells: int = 0,
    parallel: bool | None = None,
    check: Callable[[CountStatistics], None] | None = None,
) -> tuple[CountStatistics, np.ndarray]:
    """Read every cell once; return statistics over the genes that are kept, and which those are, bool (g,).

    Args:
        ids: soma_joinids, sorted, (n,).
        train: Cells that gene statistics are taken from, bool (n,).
        gene_lut: var soma_joinid -> gene id, -1 for genes outside the vocabulary.
        n_genes: Genes of the vocabulary, some of which the source may lack.
        min_cells: Keep genes that at least this many training cells express. If there are none, all genes are kept,
            so that the statistics show how far off the number is.
        parallel: Whether to read over Ray; None: if a cluster is up and there are many cells.
        check: Called with the statistics over all genes of `gene_lut`, before any is left out.

    Raises:
        InputError: a value is not a count.
    """
    if parallel is None:
        parallel = len(ids) >= PARALLEL_CELLS and cluster_is_up()
    totals = _Totals(len(ids), n_genes, min_cells)
    reading = _Reading(store, gene_lut, n_genes)
    parts = _parts(ids, train, store.tile, READS_PER_TASK if parallel else 1, totals)
    for partial in each_in_order(_read_part, reading, parts, parallel=parallel):
        totals.add(partial)
    stats = totals.statistics(int(train.sum()))
    if check is not None:
        check(stats)
    kept = totals.gene_cells >= min_cells
    if kept.all() or not kept.any():
        return stats, kept
    if totals.held is None:  # too many counts of rare genes to hold: what the cells lose is read again
        narrow = np.where(gene_lut >= 0, np.where(kept, np.cumsum(kept) - 1, -1)[gene_lut], -1).astype(np.int32)
        return count_statistics(store, ids, train, narrow, int(kept.sum()), parallel=parallel)[0], kept
    lost_counts, lost_genes = totals.held.of_cells(~kept, len(ids))
    genes = {f: getattr(stats, f)[kept] for f in ("gene_cells", "gene_sum", "gene_sum_squares")}
    cells = {"library_size": stats.library_size - lost_counts, "n_expressed": stats.n_expressed - lost_genes}
    return replace(stats, **genes, **cells), kept


# ---- parts -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Reading:
    """What every part needs."""

    store: SomaStore
    gene_lut: np.ndarray
    n_genes: int


@dataclass(frozen=True)
class _Part:
    """Cells of whole groups of tiles."""

    ids: np.ndarray
    train: np.ndarray
    undecided: np.ndarray | None  # genes that may still be left out, bool (g,)


@dataclass(frozen=True)
class _Partial:
    """Sums over a part; whole numbers."""

    library_size: np.ndarray
    n_expressed: np.ndarray
    gene_cells: np.ndarray
    gene_sum: np.ndarray
    gene_squares: np.ndarray
    digests: bytes  # of each group
    rare: CountEntries | None  # counts of the undecided genes


def _parts(ids: np.ndarray, train: np.ndarray, tile: int, n_groups: int, totals: _Totals) -> Iterator[_Part]:
    group = ids // (tile * TILES_PER_READ)
    cuts = np.r_[0, np.flatnonzero(np.diff(group)) + 1]
    starts = cuts[::n_groups]
    for a, b in zip(starts, np.r_[starts[1:], len(ids)], strict=True):
        yield _Part(ids[a:b], train[a:b], totals.undecided)


def _read_part(reading: _Reading, part: _Part) -> _Partial:
    """Sum up a part; runs here or as a Ray task."""
    n, g = len(part.ids), reading.n_genes
    library_size, n_expressed = np.zeros(n), np.zeros(n, np.int64)
    gene_cells, gene_sum, gene_squares = (np.zeros(g, np.int64) for _ in range(3))
    digests, rare = [], []
    group = part.ids // (reading.store.tile * TILES_PER_READ)
    for at in np.split(np.arange(n), np.flatnonzero(np.diff(group)) + 1):
        rows = reading.store.read_ragged(part.ids[at], reading.gene_lut)
        _require_counts(reading.store, part.ids[at], rows.indptr, rows.counts)
        digests.append(_digest(rows.indptr.astype(np.int64), rows.genes, rows.counts))
        sizes = np.diff(rows.indptr)
        ends = np.concatenate([[0.0], np.cumsum(rows.counts, dtype=np.float64)])[rows.indptr]
        library_size[at], n_expressed[at] = np.diff(ends), sizes
        of_train = np.repeat(part.train[at], sizes)
        genes, counts = rows.genes[of_train], rows.counts[of_train].astype(np.float64)
        gene_cells += np.bincount(genes, minlength=g)
        gene_sum += np.rint(np.bincount(genes, counts, minlength=g)).astype(np.int64)
        gene_squares += np.rint(np.bincount(genes, counts**2, minlength=g)).astype(np.int64)
        if part.undecided is not None:
            few = part.undecided[rows.genes]
            rare.append(CountEntries(np.repeat(at, sizes)[few], rows.genes[few], rows.counts[few]))
    found = None if part.undecided is None else CountEntries.joined(rare)
    return _Partial(library_size, n_expressed, gene_cells, gene_sum, gene_squares, b"".join(digests), found)


# ---- totals ------------------------------------------------------------------------------------------------------
@dataclass
class RareEntries:
    """Counts of genes that may turn out too rare to keep, held during the pass.

    Whether a gene is expressed in enough cells is known only at the end, and then its counts must be subtracted from
    the library sizes. Entries of a gene that has reached the number are dropped, so that about `min_cells` entries are
    held for each gene; if that is still too much, nothing is held and the caller reads a second time.
    """

    parts: list[CountEntries] = field(default_factory=list)
    size: int = 0
    tidied: int = 0  # size after entries were last dropped

    def add(self, entries: CountEntries, first_cell: int, undecided: np.ndarray) -> bool:
        """Hold the entries of a part; return False if they are too many to hold.

        Args:
            entries: Entries of the part; cells count from its first.
            first_cell: Number of that cell among all.
            undecided: Genes that may still be left out, bool (g,).
        """
        part = entries.of_genes(undecided)
        self.parts.append(CountEntries(part.cells + first_cell, part.genes, part.counts))
        self.size += len(part.genes)
        if self.size > min(MAX_HELD, 2 * max(self.tidied, MAX_HELD // 8)):
            self.parts = [CountEntries.joined(self.parts).of_genes(undecided)]
            self.size = self.tidied = len(self.parts[0].genes)
        return self.size <= MAX_HELD

    def of_cells(self, genes: np.ndarray, n_cells: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sum of the counts of some genes in each cell, and their number, each (n_cells,)."""
        if not self.parts:
            return np.zeros(n_cells), np.zeros(n_cells, np.int64)
        found = CountEntries.joined(self.parts).of_genes(genes)
        total = np.bincount(found.cells, found.counts.astype(np.float64), minlength=n_cells)
        return total, np.bincount(found.cells, minlength=n_cells)


class _Totals:
    """Sums over the parts so far; parts arrive in order."""

    def __init__(self, n: int, g: int, min_cells: int):
        self.library_size, self.n_expressed, self.n_read = np.zeros(n), np.zeros(n, np.int64), 0
        self.gene_cells, self.gene_sum, self.gene_squares = (np.zeros(g, np.int64) for _ in range(3))
        self.min_cells, self.content = min_cells, hashlib.sha256()
        self.held = RareEntries() if min_cells else None

    @property
    def undecided(self) -> np.ndarray | None:
        """Genes that may still be left out; None if their entries are not held."""
        return None if self.held is None else self._too_few()

    def _too_few(self) -> np.ndarray:
        return self.gene_cells < self.min_cells

    def add(self, part: _Partial) -> None:
        at = slice(self.n_read, self.n_read + len(part.library_size))
        self.library_size[at], self.n_expressed[at] = part.library_size, part.n_expressed
        self.gene_cells += part.gene_cells
        self.gene_sum += part.gene_sum
        self.gene_squares += part.gene_squares
        self.content.update(part.digests)
        if self.held is not None and part.rare is not None and not self.held.add(part.rare, at.start, self._too_few()):
            self.held = None
        self.n_read = at.stop

    def statistics(self, n_train: int) -> CountStatistics:
        sums = (self.gene_cells, self.gene_sum, self.gene_squares)
        return CountStatistics(self.library_size, self.n_expressed, *sums, n_train, self.content.hexdigest())


def _digest(*values: np.ndarray) -> bytes:
    content = hashlib.sha256()
    for x in values:
        content.update(np.ascontiguousarray(x).data)
    return content.digest()


def _require_counts(store: SomaStore, ids: np.ndarray, indptr: np.ndarray, counts: np.ndarray) -> None:
    bad = ~((counts >= 0) & (counts == np.rint(counts)))
    if bad.any():
        k = int(np.argmax(bad))
        cell = ids[int(np.searchsorted(indptr, k, side="right")) - 1]
        raise InputError(
            f"{store.uri}: layer {store.layer!r} of {store.measurement!r} does not hold raw counts: cell {cell} has "
            f"the value {counts[k]:.6g}; name the layer of raw counts in ingest.source.layer"
        )
