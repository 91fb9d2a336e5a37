"""A part of many cells that is quick to read and still mixed: `ingest.max_cells`.

A store is read by storage tiles of neighbours, which are mostly of one data set. Cells drawn one by one would touch
every tile, so that a hundredth of the cells costs what all of them cost; whole tiles alone could be one data set. So at
least MIN_TILES tiles give cells, where the source has them, and no more than are needed for whole ones.
"""

from __future__ import annotations

import numpy as np

MIN_TILES = 16
_SALT = np.uint64(0x5CA1AB1E)  # not that of a split: which cells are taken says nothing about their side


def part_of_cells(joinids: np.ndarray, n: int, *, tile: int) -> np.ndarray:
    """Places of n of the cells, ascending; a function of the joinids and n alone.

    Tiles come in an order that is a hash of theirs, and give ceil(n / MIN_TILES) cells in a round, by a hash of the
    cell; further rounds follow only if one through all tiles is not enough.

    Args:
        joinids: soma_joinid of each cell, (N,).
        n: Cells to take; all of them if there are no more.
        tile: Rows of a storage tile.
    """
    if n >= len(joinids):
        return np.arange(len(joinids))
    tiles, of = np.unique(joinids // tile, return_inverse=True)
    share = -(-n // MIN_TILES)
    by_tile = np.lexsort((mix(joinids.astype(np.uint64) ^ _SALT), of))
    starts = np.flatnonzero(np.r_[True, np.diff(of[by_tile]) > 0])
    rank = np.empty(len(joinids), np.int64)
    rank[by_tile] = np.arange(len(joinids)) - starts[of[by_tile]]
    order = np.lexsort((rank, mix(tiles.astype(np.uint64) ^ _SALT)[of], rank // share))
    return np.sort(order[:n])


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64: every bit of the key moves every bit of the result."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
