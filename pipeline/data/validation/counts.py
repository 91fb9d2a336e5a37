"""Checks that values are raw counts: totals over all values, which arrive in pieces, with examples of each fault.

`value_faults` defines what is no count; ingest stops at the first piece with a fault, `scldm validate-data` continues
and counts all faults.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pipeline.data.entries import CountEntries
from pipeline.data.findings import FIRST, Finding, error, warning
from pipeline.data.validation.cell_hashes import MIN_GENES, CellHashes, first_of_each

EXACT = 1 << 24  # float32 holds whole numbers exactly up to here
NEARLY_WHOLE = 1e-3  # relative distance from a whole number that rounding errors explain
SIDES = 3  # of a split: training, validation and test cells
OUTLIER = 50  # times the median library size
LEAVE_OUT_COPIES = (
    "to leave them out, leave out a file, or write is_primary_data: False into obs for them and set "
    "ingest.cells.is_primary_data: true"
)
SAME_TOTAL = 0.01  # coefficient of variation of library sizes, below which they were made the same
FEWEST_TOTALS = 20  # cells, of which fewer may agree by chance
TOO_LARGE = f"are above {EXACT:,}, more than 32-bit floats count exactly"
RAW = "raw counts are needed, not normalised, log-transformed or scaled values"


def value_faults(values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the kinds of values that are no counts, each with a mask of the same shape."""
    finite = np.isfinite(values)
    yield "are NaN or infinite", ~finite
    yield "are negative", values < 0
    yield "are not whole numbers", finite & (values != np.rint(values))
    yield TOO_LARGE, finite & (values > EXACT)


def remedy_of(what: str, values_are: str) -> str:
    """Return what to do about a kind of values that are no counts.

    Args:
        what: The kind, as of `value_faults`.
        values_are: A guess of what all values are.
    """
    if what == TOO_LARGE:
        return "no gene is counted so often in a cell, and such a number would be changed: see how the values were made"
    looks = f"; these look like {values_are}" if "whole" in what or "negative" in what else ""
    return f"{RAW}{looks}"


def same_total_findings(totals: np.ndarray) -> Iterator[Finding]:
    """Warn if cells sum to about the same number: real library sizes vary.

    Args:
        totals: Sums of the counts of cells.
    """
    totals = totals[totals > 0]
    if len(totals) < FEWEST_TOTALS or not (middle := float(totals.mean())) or totals.std() >= SAME_TOTAL * middle:
        return
    yield warning(f"rescaled or downsampled to the same total (about {middle:,.0f} in every cell)",
                  "are these raw counts? The totals of raw counts differ, and the model learns them as library sizes",
                  count=len(totals))  # fmt: skip


def value_text(value: float) -> str:
    """Return a value with enough digits to show that it is not whole, if it is not."""
    short = f"{float(value):.6g}"
    looks_whole = float(short) == np.rint(float(short))
    return f"{float(value):.9g}" if looks_whole and float(short) != float(value) else short


def fractions_are(values: np.ndarray, largest: float, totals: np.ndarray) -> str:
    """Guess what values that are not negative and not all whole are, with what to do if it is not to find the counts.

    Args:
        values: A sample.
        largest: The largest of all values.
        totals: Sums of cells.
    """
    totals = totals[totals > 0]
    if len(totals) > 1 and np.ptp(totals) < 1e-3 * totals.mean():
        return f"values normalised to {totals.mean():,.0f} per cell"
    finite = values[np.isfinite(values)]
    if len(finite) and (np.abs(finite - np.rint(finite)) <= NEARLY_WHOLE * np.maximum(1, finite)).all():
        return "counts with rounding errors (adata.X = numpy.rint(adata.X) makes them whole)"
    if 0 < largest < 20:
        return "log-transformed values"
    return "counts that were corrected or averaged, as by SoupX or DecontX (use the uncorrected counts)"


class CountAudit:
    """Running totals over pieces; memory is a few numbers per cell and gene.

    Args:
        genes: Ids of the genes.
        where: Returns the names of a cell and a gene (-1: none) for examples.
    """

    def __init__(self, n_cells: int, genes: Sequence[object], where: Callable[[int, int], str]) -> None:
        n_genes = len(genes)
        self.shape = n_cells, n_genes
        self._hashes = CellHashes(n_cells, genes)
        self._where = where
        self._faults: Counter[str] = Counter()
        self._first: dict[str, list[str]] = {}
        self._fractions: list[np.ndarray] = []  # a sample of values, to guess what was done to them
        self.sums, self.per_cell = np.zeros(n_cells), np.zeros(n_cells, np.int64)
        self.per_gene = np.zeros(n_genes, np.int64)
        self.stored, self.largest = 0, 0.0

    def add(self, piece: CountEntries) -> None:
        """Add a piece."""
        values = np.asarray(piece.counts)
        self._hashes.add(piece)
        self.stored += len(values)
        for what, bad in value_faults(values):
            if n := int(bad.sum()):
                self._faults[what] += n
                examples = self._first.setdefault(what, [])
                for k in np.flatnonzero(bad)[: FIRST - len(examples)]:
                    place = self._where(int(piece.cells[k]), int(piece.genes[k]))
                    examples.append(f"{place}, value {value_text(values[k])}")
        numbers = np.where(np.isfinite(values), values, 0).astype(np.float64)
        if len(self._fractions) < 8:
            self._fractions.append(numbers[:4096])
        expressed = numbers > 0
        self.largest = max(self.largest, float(numbers.max(initial=0)))
        self.sums += np.bincount(piece.cells, weights=numbers, minlength=self.shape[0])
        self.per_cell += np.bincount(piece.cells[expressed], minlength=self.shape[0])
        self.per_gene += np.bincount(piece.genes[expressed], minlength=self.shape[1])

    @property
    def hashes(self) -> np.ndarray:
        """Hashes of the cells, (n, 2); zero for those that may agree with others by chance."""
        return np.where((self.per_cell >= MIN_GENES)[:, None], self._hashes.values, 0)

    @property
    def raw(self) -> bool:
        """Whether all values are counts."""
        return not self._faults

    def guess(self) -> str:
        """Guess what was done to values that are no counts."""
        if self.raw:
            return "raw counts"
        values = np.concatenate(self._fractions) if self._fractions else np.zeros(0)
        if (values < 0).any():
            return "scaled values"
        if set(self._faults) == {TOO_LARGE}:
            return f"whole numbers, {self._faults[TOO_LARGE]:,} of them too large for counts"
        return fractions_are(values, self.largest, self.sums)

    def findings(self, places: list[str]) -> Iterator[Finding]:
        """Yield the problems.

        Args:
            places: Places that hold counts instead, as config text.
        """
        elsewhere = f"; this file has counts elsewhere: set ingest.source.{' or '.join(places)}" if places else ""
        for what, n in self._faults.items():
            remedy = remedy_of(what, self.guess())
            yield error(f"{n:,} values {what}", f"{remedy}{elsewhere}", count=n, first=self._first[what])
        yield from self._empty()
        if self.raw:
            yield from list(self._few_different()) or same_total_findings(self.sums)
        yield from copy_findings(self.hashes, lambda cell: self._where(cell, -1))
        middle = float(np.median(self.sums[self.sums > 0])) if (self.sums > 0).any() else 0.0
        large = np.flatnonzero(self.sums > OUTLIER * middle) if self.raw and middle else np.zeros(0, int)
        if len(large):
            yield warning(f"{len(large)} cells have over {OUTLIER} times the median of {middle:,.0f} counts",
                          "doublets or sums of cells? leave them out", count=len(large),
                          first=[f"{self._where(int(c), -1)}: {self.sums[c]:,.0f}" for c in large[:FIRST]])  # fmt: skip

    def _few_different(self) -> Iterator[Finding]:
        """Warn if cells are copies of so few that no split has a cell for each of its sides."""
        hashes = self._hashes.values[self.per_cell > 0]
        n = len(np.unique(hashes, axis=0))
        if 0 < n < SIDES <= len(hashes):
            yield warning(all_copies(len(hashes), n), "ingest refuses to split them: see how the file was made",
                        count=len(hashes))  # fmt: skip

    def _empty(self) -> Iterator[Finding]:
        cells, genes = np.flatnonzero(self.per_cell == 0), np.flatnonzero(self.per_gene == 0)
        if self.shape[0] and len(cells) == self.shape[0]:
            yield error("no cell has a count", RAW, count=len(cells))
        elif len(cells):
            first = [self._where(int(c), -1) for c in cells[:FIRST]]
            yield warning(f"{len(cells)} of {self.shape[0]} cells have no counts", "ingest leaves them out",
                          count=len(cells), first=first)  # fmt: skip
        if 0 < len(genes) < self.shape[1]:
            first = [self._where(-1, int(g)) for g in genes[:FIRST]]
            yield warning(f"{len(genes)} of {self.shape[1]} genes are in no cell",
                          "ingest.genes.min_cells: 1 leaves them out", count=len(genes), first=first)  # fmt: skip


def all_copies(n_cells: int, n_different: int) -> str:
    """Say that cells are copies of few."""
    plural = "one" if n_different == 1 else "ones"
    return (
        f"all {n_cells:,} cells are copies of {n_different:,} different {plural}, and copies share a side of the split"
    )


def copy_findings(hashes: np.ndarray, name: Callable[[int], str]) -> Iterator[Finding]:
    """Yield a finding if cells occur more than once.

    Args:
        hashes: Of the cells, (n, 2); zero for cells that are not compared.
        name: Returns the name of a cell for examples.
    """
    first = first_of_each(hashes)
    again = np.flatnonzero((first != np.arange(len(first))) & hashes.any(axis=1))
    if len(again):
        yield warning(f"{len(again):,} of {len(hashes):,} cells have exactly the counts of an earlier cell",
                      f"ingest keeps copies on one side of the split; {LEAVE_OUT_COPIES}",
                      count=len(again),
                      first=[f"{name(int(k))} is {name(int(first[k]))}" for k in again[:FIRST]])  # fmt: skip
