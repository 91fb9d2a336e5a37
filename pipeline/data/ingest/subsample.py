"""Subsamples cells so that they are quick to read and still mixed: `ingest.max_cells`.

A store is read by storage tiles of neighbours, which are mostly of one data set. Cells drawn one by one would touch
every tile, so that reading a hundredth of the cells would cost as much as reading all; whole tiles alone could be one
data set. So cells come from at least MIN_TILES tiles, if the source has them, and from no more than needed.
"""

from __future__ import annotations

import numpy as np

MIN_TILES = 16
_SALT = np.uint64(0x5CA1AB1E)  # differs from a split's, so that the choice of cells is independent of their split


def subsample_cells(joinids: np.ndarray, n: int, *, tile: int, seed: int = 0) -> np.ndarray:
    """Return the positions of n of the cells, ascending; a function of the joinids, n and the seed alone.

    Tiles are ordered by a hash of their number, and each gives ceil(n / MIN_TILES) cells in a round, ordered by a hash
    of the cell; further rounds follow only if one round through all tiles is not enough.

    Args:
        joinids: soma_joinid of each cell, (N,).
        n: Number of cells to take; all cells if there are no more.
        tile: Rows of a storage tile.
        seed: Below 2^32; another seed takes other cells.
    """
    if n >= len(joinids):
        return np.arange(len(joinids))
    salt = _SALT ^ np.uint64(seed << 32)
    tiles, of = np.unique(joinids // tile, return_inverse=True)
    share = -(-n // MIN_TILES)
    by_tile = np.lexsort((mix(joinids.astype(np.uint64) ^ salt), of))
    starts = np.flatnonzero(np.r_[True, np.diff(of[by_tile]) > 0])
    rank = np.empty(len(joinids), np.int64)
    rank[by_tile] = np.arange(len(joinids)) - starts[of[by_tile]]
    order = np.lexsort((rank, mix(tiles.astype(np.uint64) ^ salt)[of], rank // share))
    return np.sort(order[:n])


def mix(x: np.ndarray) -> np.ndarray:
    """Hash by splitmix64: every bit of the key changes every bit of the result."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
