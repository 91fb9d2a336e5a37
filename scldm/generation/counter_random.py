"""Counter-based random numbers: a number is a function of (seed, stream, cell id, position) only.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a counter of four words and a
key of two words to four random words. There is no state, so cells can be generated in any order, batch or process. The
loops are compiled by numba once per machine and release the GIL.

Counter: (position, cell id, its upper half, stream and sub-stream). Key: the two halves of the seed.

Shape letters: b cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numba
import numpy as np

MASK = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
TO_UNIT = 2.0**-32


@numba.njit(cache=True, nogil=True)
def philox(c0: np.uint64, c1: np.uint64, c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64):
    """Return four random words of a counter and a key; all are uint64 < 2^32."""
    for _ in range(10):
        p0, p1 = M0 * c0, M1 * c2
        c0, c1, c2, c3 = (p1 >> SHIFT) ^ c1 ^ k0, p1 & MASK, (p0 >> SHIFT) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return c0, c1, c2, c3


@numba.njit(cache=True, nogil=True)
def _normals(out: np.ndarray, cells: np.ndarray, k0: np.uint64, k1: np.uint64, stream: np.uint64):
    """Fill out (b, n) with normals by the Box-Muller method: four words give four normals."""
    n = out.shape[1]
    for row in range(out.shape[0]):
        low, high = cells[row] & MASK, cells[row] >> SHIFT
        for block in range((n + 3) // 4):
            w0, w1, w2, w3 = philox(np.uint64(block), low, high, stream, k0, k1)
            for pair in range(2):
                u, v = (w0, w1) if pair == 0 else (w2, w3)
                radius = math.sqrt(-2.0 * math.log((u + 0.5) * TO_UNIT))
                angle = 2.0 * math.pi * v * TO_UNIT
                at = 4 * block + 2 * pair
                if at < n:
                    out[row, at] = radius * math.cos(angle)
                if at + 1 < n:
                    out[row, at + 1] = radius * math.sin(angle)


def key_of(seed: int) -> tuple[np.uint64, np.uint64]:
    """Return the two words of a seed, 0 <= seed < 2^64."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed must lie in 0 .. 2^64 - 1; got {seed}")
    return np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)


def as_cells(cell_ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return cell ids as uint64, (b,); they must be >= 0."""
    ids = np.asarray(cell_ids, dtype=np.int64)
    if ids.size and ids.min() < 0:
        raise ValueError(f"cell ids must be >= 0; got {int(ids.min())}")
    return ids.astype(np.uint64)


def normals(cell_ids: Sequence[int] | np.ndarray, n: int, *, seed: int, stream: int) -> np.ndarray:
    """Return n standard normal numbers for each cell, (b, n) float32. They do not depend on n."""
    out = np.empty((len(cell_ids), n), dtype=np.float32)
    _normals(out, as_cells(cell_ids), *key_of(seed), np.uint64(stream))
    return out
