"""From Arrow tables of cells to tensors; no copy where the types agree.

Shape letters: b cells, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.data.loading.blocks import LABEL
from pipeline.data.presence import GROUP
from scldm.data.batch import CellBatch


@dataclass(frozen=True)
class LatentBatch:
    """Latents of b cells, from the cache."""

    latents: Tensor  # (b, m, e) float32
    log_library_size: Tensor  # (b,) float32
    conditions: Mapping[str, Tensor]  # label -> (b,) int64 class ids
    joinids: Tensor  # (b,) int64
    weight: Tensor  # (b,) float32; 0 for the repeats that fill the last batch of an epoch

    @property
    def n_cells(self) -> int:
        return len(self.joinids)

    def to(self, device: torch.device | str) -> LatentBatch:
        move = lambda x: x.to(device, non_blocking=True)  # noqa: E731
        return replace(
            self,
            **{f: move(getattr(self, f)) for f in ("latents", "log_library_size", "joinids", "weight")},
            conditions={k: move(v) for k, v in self.conditions.items()},
        )


def to_cell_batch(
    table: pa.Table, label_names: Sequence[str], *, max_genes: int | None = None, seed: int = 0
) -> CellBatch:
    """A batch of counts.

    Args:
        table: soma_joinid, gene, count, `label:<name>`, library_size; weight, or 1 for all.
        max_genes: Keep at most so many expressed genes of a cell, a function of (seed, joinid); library_size stays that
            of the whole cell.
    """
    genes, counts = _column(table, "gene"), _column(table, "count")
    offsets = genes.offsets.to_numpy().astype(np.int64)
    gene_ids, values = genes.flatten().to_numpy(), counts.flatten().to_numpy()
    offsets -= offsets[0]  # a slice's offsets start where the slice does
    joinids = _column(table, "soma_joinid").to_numpy()
    if max_genes is not None and len(offsets) > 1 and np.diff(offsets).max() > max_genes:
        keep = _sampled(offsets, joinids, max_genes, seed)
        offsets = np.concatenate([[0], np.cumsum(np.minimum(np.diff(offsets), max_genes))])
        gene_ids, values = gene_ids[keep], values[keep]
    return CellBatch(
        offsets=torch.from_numpy(offsets),
        gene_ids=torch.from_numpy(gene_ids.astype(np.int64)),
        counts=torch.from_numpy(values.astype(np.float32)),
        library_size=_float(table, "library_size"),
        conditions=_conditions(table, label_names),
        joinids=torch.from_numpy(joinids.copy()),
        weight=_weight(table),
    )


def measured_group(table: pa.Table) -> Tensor:
    """For each cell the row of `IngestedDataset.measured` that says which genes it measured, (b,) int64."""
    return torch.from_numpy(_column(table, LABEL + GROUP).to_numpy().astype(np.int64))


@dataclass(frozen=True)
class PaddedCells:
    """Expressed genes of b cells, padded to the longest of them with gene 0 and count 0."""

    gene_ids: Tensor  # (b, s) int64
    counts: Tensor  # (b, s) float32
    lengths: Tensor  # (b,) int64


def padded(cells: CellBatch) -> PaddedCells:
    """Pad on the device that the cells are on: what travels to it is ragged."""
    longest = int(cells.lengths.max())
    pad = torch.ops.aten._jagged_to_padded_dense_forward  # what torch.nested calls; that way costs half as much again
    return PaddedCells(
        pad(cells.gene_ids, [cells.offsets], [longest], 0),
        pad(cells.counts, [cells.offsets], [longest], 0.0),
        cells.lengths,
    )


def to_latent_batch(table: pa.Table, label_names: Sequence[str], *, shape: tuple[int, int]) -> LatentBatch:
    """A batch of latents.

    Args:
        table: soma_joinid, latent, `label:<name>`, log_library_size; weight, or 1 for all.
        shape: (m, e).
    """
    values = _column(table, "latent").flatten().to_numpy()
    return LatentBatch(
        latents=torch.from_numpy(values.reshape(len(table), *shape).copy()),
        log_library_size=_float(table, "log_library_size"),
        conditions=_conditions(table, label_names),
        joinids=torch.from_numpy(_column(table, "soma_joinid").to_numpy().copy()),
        weight=_weight(table),
    )


def _sampled(offsets: np.ndarray, joinids: np.ndarray, max_genes: int, seed: int) -> np.ndarray:
    """Entries to keep."""
    kept = []
    for start, stop, joinid in zip(offsets[:-1], offsets[1:], joinids, strict=True):
        if stop - start <= max_genes:
            kept.append(np.arange(start, stop))
        else:
            rng = np.random.Generator(np.random.Philox(key=np.array([seed, joinid], np.uint64)))
            kept.append(start + np.sort(rng.choice(stop - start, max_genes, replace=False)))
    return np.concatenate(kept)


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _float(table: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(_column(table, name).to_numpy().astype(np.float32))  # a copy: Arrow's memory is read-only


def _conditions(table: pa.Table, label_names: Sequence[str]) -> dict[str, Tensor]:
    return {n: torch.from_numpy(_column(table, LABEL + n).to_numpy().astype(np.int64)) for n in label_names}


def _weight(table: pa.Table) -> Tensor:
    return _float(table, "weight") if "weight" in table.column_names else torch.ones(len(table))
