"""Hashes of the counts of cells, by which the same cell is found twice: 16 bytes a cell.

A cell's hash is a sum of hashes of its (gene, count) pairs, so it does not depend on the order of entries, and a cell
may arrive in pieces. Zeros add nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from pipeline.data.entries import CountEntries
from pipeline.data.ingest.subsample import mix
from pipeline.data.tables import plain_id

COLUMNS = ("counts_hash_0", "counts_hash_1")  # of obs, in experiments that are written here; int64
MIN_GENES = 10  # with fewer expressed genes, different cells may have the same counts by chance
_AT_ONCE = 1 << 17  # entries; what is computed of them stays in the processor's cache
_SALTS = (np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344))


class CellHashes:
    """Hashes of cells whose counts arrive in pieces.

    Args:
        genes: Ids of the genes, to compare cells of several files; None numbers them, to compare cells of one matrix.
    """

    def __init__(self, n_cells: int, genes: Sequence[object] | None = None) -> None:
        self.values = np.zeros((n_cells, 2), np.uint64)
        self._genes = None if genes is None else _keys(genes)

    def add(self, entries: CountEntries) -> None:
        """Add entries; each (cell, gene) once."""
        for start in range(0, len(entries.counts), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            self._add(*(np.asarray(x[part]) for x in (entries.cells, entries.genes, entries.counts)))

    def _add(self, cells: np.ndarray, genes: np.ndarray, counts: np.ndarray) -> None:
        if not (real := counts != 0).all():
            cells, genes, counts = cells[real], genes[real], counts[real]
        keys = mix(genes.astype(np.uint64)) if self._genes is None else self._genes[genes]
        with np.errstate(over="ignore"):
            pair = keys + counts.astype(np.float64).view(np.uint64)
            for k, salt in enumerate(_SALTS):
                np.add.at(self.values[:, k], cells, mix(pair ^ salt))

    def columns(self) -> dict[str, np.ndarray]:
        """Return the hashes as columns of obs."""
        return {name: self.values[:, k].view(np.int64) for k, name in enumerate(COLUMNS)}


def first_of_each(hashes: np.ndarray) -> np.ndarray:
    """Return the position of the first cell with the same hash, for each cell: its own if there is none before.

    Args:
        hashes: (n, 2).
    """
    n = len(hashes)
    if not n:
        return np.zeros(0, np.int64)
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: the first of equal cells comes first
    new = np.r_[True, (np.diff(hashes[order].view(np.int64), axis=0) != 0).any(axis=1)]
    first = np.empty(n, np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return first


def _keys(genes: Sequence[object]) -> np.ndarray:
    digests = (hashlib.blake2b(plain_id(g).encode("utf-8", "replace"), digest_size=8).digest() for g in genes)
    return np.frombuffer(b"".join(digests), np.uint64)
