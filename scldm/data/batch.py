"""A batch of cells, sparse (CSR) from the store to the device.

Shape letters: b cells, nnz expressed (cell, gene) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor


@dataclass(frozen=True)
class CellBatch:
    """Expressed genes of b cells in CSR form, with what is known about each cell."""

    offsets: Tensor  # (b + 1,) int64; cell i owns entries offsets[i] : offsets[i + 1]
    gene_ids: Tensor  # (nnz,) int64, 0 .. g-1
    counts: Tensor  # (nnz,) float32, > 0
    library_size: Tensor  # (b,) float32, sum of the cell's counts over the vocabulary
    conditions: Mapping[str, Tensor]  # label -> (b,) int64 class ids, null id where unknown
    joinids: Tensor  # (b,) int64, soma_joinid
    weight: Tensor  # (b,) float32; 0 for repeated cells that pad the last batch of an epoch
    measured: Tensor | None = None  # (b, g) bool: genes that a cell's data set measured; None: all of them
    longest: int | None = None  # most entries of a cell, from `with_longest`: no device has to be asked

    @property
    def n_cells(self) -> int:
        """Number of cells, b."""
        return len(self.library_size)

    @property
    def lengths(self) -> Tensor:
        """Number of expressed genes of each cell, (b,)."""
        return self.offsets[1:] - self.offsets[:-1]

    @cached_property
    def cell_index(self) -> Tensor:
        """Cell that each entry belongs to, (nnz,)."""
        cells = torch.arange(self.n_cells, device=self.offsets.device)
        return torch.repeat_interleave(cells, self.lengths, output_size=len(self.gene_ids))

    def with_longest(self) -> CellBatch:
        """Return the batch with `longest` set; for what an encoder sees, on the CPU, before it is copied to a device.

        Raises:
            ValueError: A cell has no entries.
        """
        lengths = self.lengths
        if len(lengths) and int(lengths.min()) < 1:
            require_tokens(lengths.tolist())
        return replace(self, longest=int(lengths.max()) if len(lengths) else 0)

    def to(self, device: torch.device | str) -> CellBatch:
        """Return the batch on a device; copies from pinned memory are asynchronous."""
        move = lambda x: x.to(device, non_blocking=True)  # noqa: E731
        leaves_host = self.offsets.device.type == "cpu" != torch.device(device).type
        return replace(
            self.with_longest() if leaves_host and self.longest is None else self,
            **{
                f: move(getattr(self, f))
                for f in ("offsets", "gene_ids", "counts", "library_size", "joinids", "weight")
            },
            conditions={k: move(v) for k, v in self.conditions.items()},
            measured=None if self.measured is None else move(self.measured),
        )

    def dense(self, n_genes: int) -> Tensor:
        """Return the counts as a (b, g) matrix; for tests and small data only."""
        out = self.counts.new_zeros(self.n_cells, n_genes)
        out[self.cell_index, self.gene_ids] = self.counts
        return out

    @classmethod
    def from_csr(
        cls, counts: sp.csr_matrix, *, first: int = 0, conditions: Mapping[str, Tensor] | None = None
    ) -> CellBatch:
        """Build a batch from (b, g) counts without stored zeros; joinids count from `first`."""
        n = counts.shape[0]
        return cls(
            offsets=torch.from_numpy(counts.indptr.astype(np.int64)),
            gene_ids=torch.from_numpy(counts.indices.astype(np.int64)),
            counts=torch.from_numpy(counts.data.astype(np.float32)),
            library_size=torch.from_numpy(np.asarray(counts.sum(1)).ravel().astype(np.float32)),
            conditions=dict(conditions or {}),
            joinids=torch.arange(first, first + n),
            weight=torch.ones(n),
        )

    @classmethod
    def from_dense(cls, counts: Tensor, conditions: Mapping[str, Tensor] | None = None) -> CellBatch:
        """Build a batch from a (b, g) matrix of counts; for tests and notebooks.

        Raises:
            ValueError: The counts are not a matrix of whole numbers >= 0, or conditions have another shape or type.
        """
        require_counts(counts)
        for label, ids in (conditions or {}).items():
            if ids.shape != counts.shape[:1] or ids.dtype != torch.int64:
                raise ValueError(
                    f"conditions[{label!r}] must be class ids, int64 of shape ({len(counts)},); got {ids.dtype} "
                    f"of shape {tuple(ids.shape)}"
                )
        cell, gene = counts.nonzero(as_tuple=True)
        n = len(counts)
        offsets = torch.zeros(n + 1, dtype=torch.int64, device=counts.device)
        offsets[1:] = torch.bincount(cell, minlength=n).cumsum(0)
        return cls(
            offsets=offsets,
            gene_ids=gene,
            counts=counts[cell, gene],
            library_size=counts.sum(1),
            conditions=dict(conditions or {}),
            joinids=torch.arange(n, device=counts.device),
            weight=torch.ones(n, device=counts.device, dtype=counts.dtype),
        )


def require_tokens(lengths: Sequence[int]) -> None:
    """Raise ValueError if a cell has no tokens: a softmax over nothing is not defined."""
    if empty := [i for i, n in enumerate(lengths) if n < 1]:
        raise ValueError(f"cells {empty[:5]} of the batch have no tokens (no expressed genes): leave them out")


def require_counts(counts: Tensor) -> None:
    """Raise ValueError unless the matrix holds raw counts; the message names the first cell and gene that does not."""
    if counts.ndim != 2:
        raise ValueError(f"counts must be (cells, genes); got shape {tuple(counts.shape)}")
    if counts.dtype == torch.bool or counts.is_complex():
        raise ValueError(f"counts must be numbers; got {counts.dtype}")
    for what, bad in (
        ("must be finite", ~counts.isfinite()),
        ("must not be negative", counts < 0),
        ("must be whole numbers, not normalised or log-transformed values", counts != counts.round()),
    ):
        if bad.any():
            cell, gene = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"counts {what}; {int(bad.sum())} are not, the first is {counts[cell, gene].item():g} "
                f"(cell {cell}, gene {gene})"
            )
