"""Writes a shard of generated cells while they are made: an h5ad file that is never in memory as a whole.

Cells are gathered to blocks of a fixed number, their non-zeros and latents to chunks of a fixed size, which are
compressed (shuffle and zlib level 1) outside the interpreter's lock and appended. Neither depends on how the cells are
cut into batches, so equal cells give equal bytes. Only a few numbers per cell are kept until the end, for obs.

Shape letters: b cells, p written genes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import write_elem
from numpy.typing import DTypeLike

CHUNK_BYTES = 1 << 20
BLOCK_ROWS = 256


class _Column:
    """A dataset that grows by whole compressed chunks of rows; the last chunk may be short."""

    def __init__(self, group: h5py.Group, name: str, dtype: DTypeLike, width: int | None = None):
        self.tail = () if width is None else (width,)
        self.dtype = np.dtype(dtype)
        row_bytes = self.dtype.itemsize * max(1, width or 1)
        self.rows = max(1, CHUNK_BYTES // row_bytes)
        self.data = group.create_dataset(
            name, shape=(0, *self.tail), maxshape=(None, *self.tail), dtype=self.dtype,
            chunks=(self.rows, *(max(1, w) for w in self.tail)), shuffle=True, compression="gzip", compression_opts=1,
        )  # fmt: skip
        self.waiting: list[np.ndarray] = []
        self.n_waiting = self.n_written = 0

    def add(self, values: np.ndarray) -> None:
        self.waiting.append(np.ascontiguousarray(values, dtype=self.dtype))
        self.n_waiting += len(values)
        if self.n_waiting < self.rows:
            return
        whole = np.concatenate(self.waiting)
        full = len(whole) - len(whole) % self.rows
        for start in range(0, full, self.rows):
            self._append(whole[start : start + self.rows])
        self.waiting, self.n_waiting = [whole[full:].copy()], len(whole) - full

    def close(self) -> None:
        rest = np.concatenate(self.waiting) if self.waiting else np.empty((0, *self.tail), self.dtype)
        if len(rest):
            self._append(rest)

    def _append(self, rows: np.ndarray) -> None:
        n = len(rows)
        if n < self.rows:  # a chunk in a file is always whole
            rows = np.concatenate([rows, np.zeros((self.rows - n, *self.tail), self.dtype)])
        shuffled = rows.view(np.uint8).reshape(-1, self.dtype.itemsize).T.tobytes()
        self.data.resize(self.n_written + n, axis=0)
        place = (self.n_written, *(0 for _ in self.tail))
        self.data.id.write_direct_chunk(place, zlib.compress(shuffled, 1))
        self.n_written += n


class ShardFile:
    """Writes one shard: `add` batches of cells, then `finish` with obs, var and uns.

    A context manager: leaving the block without `finish` removes the file.
    """

    def __init__(self, path: Path, *, n_genes: int, latent_width: int, dtype: DTypeLike = np.int32):
        self.path, self.n_genes = path, n_genes
        self.file = h5py.File(path, "w")
        self.file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        x = self.file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        obsm = self.file.create_group("obsm")
        obsm.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        self.counts, self.columns = _Column(x, "data", dtype), _Column(x, "indices", np.int32)
        self.latents = _Column(obsm, "X_scldm", np.float32, latent_width)
        self.latents.data.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        self.waiting: list[tuple[sp.csr_matrix, np.ndarray]] = []
        self.n_waiting = 0
        self.lengths: list[np.ndarray] = []
        self.totals: list[np.ndarray] = []
        self.finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.file.close()
        if not self.finished:
            self.path.unlink(missing_ok=True)

    def add(self, counts: sp.csr_matrix, latents: np.ndarray) -> None:
        """Append the next cells: values (b, p) of the file's type and latents (b, m * e)."""
        self.waiting.append((counts, latents))
        self.n_waiting += counts.shape[0]
        self.lengths.append(np.diff(counts.indptr))
        self.totals.append(np.asarray(counts.sum(1)).ravel())
        if self.n_waiting >= BLOCK_ROWS:
            self._flush(self.n_waiting - self.n_waiting % BLOCK_ROWS)

    def _flush(self, n: int) -> None:
        """Pass the first n waiting cells on, block by block, which fixes the order of chunks in the file."""
        counts, latents = zip(*self.waiting, strict=True)
        stacked, dense = sp.vstack(counts, format="csr"), np.concatenate(latents)
        for start in range(0, n, BLOCK_ROWS):
            block = slice(start, min(start + BLOCK_ROWS, n))
            entries = slice(stacked.indptr[block.start], stacked.indptr[block.stop])
            self.counts.add(stacked.data[entries])
            self.columns.add(stacked.indices[entries])
            self.latents.add(dense[block])
        self.waiting = [(stacked[n:], dense[n:].copy())]
        self.n_waiting = len(dense) - n

    @property
    def n_expressed(self) -> np.ndarray:
        """Number of genes with a count of each cell so far, (b,)."""
        return np.concatenate([np.zeros(0, np.int64), *self.lengths])

    @property
    def total_counts(self) -> np.ndarray:
        """Sum of counts of each cell so far, (b,)."""
        return np.concatenate([np.zeros(0, np.int64), *self.totals])

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame, uns: Mapping[str, Any]) -> None:
        """Write what is left, with obs, var and uns, and close the file."""
        if self.n_waiting:
            self._flush(self.n_waiting)
        lengths = self.n_expressed
        if len(obs) != len(lengths):
            raise ValueError(f"obs has {len(obs)} rows, the shard {len(lengths)} cells")
        for column in (self.counts, self.columns, self.latents):
            column.close()
        offsets = np.concatenate([[0], lengths.cumsum()])
        small = offsets[-1] < 2**31
        self.file["X"].create_dataset("indptr", data=offsets.astype(np.int32 if small else np.int64))
        self.file["X"].attrs["shape"] = np.array([len(lengths), self.n_genes], dtype=np.int64)
        for name in ("layers", "obsp", "varm", "varp"):
            write_elem(self.file, name, {})
        write_elem(self.file, "obs", obs)
        write_elem(self.file, "var", var)
        write_elem(self.file, "uns", dict(uns))
        self.file.close()
        self.finished = True
