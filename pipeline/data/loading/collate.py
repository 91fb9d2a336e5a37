"""Collates Arrow tables of cells into tensors, without a copy where the types agree.

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
    """Latents of b cells, from the latent cache."""

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
    """Collate a table of counts.

    Args:
        table: Columns soma_joinid, gene, count, `label:<name>`, library_size; weight, or 1 for all.
        max_genes: See `subsample_genes`.
    """
    genes, counts = _column(table, "gene"), _column(table, "count")
    offsets = genes.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]  # a slice's offsets start where the slice does
    batch = CellBatch(
        offsets=torch.from_numpy(offsets),
        gene_ids=torch.from_numpy(genes.flatten().to_numpy().astype(np.int64)),
        counts=torch.from_numpy(counts.flatten().to_numpy().astype(np.float32)),
        library_size=_float(table, "library_size"),
        conditions=_conditions(table, label_names),
        joinids=torch.from_numpy(_column(table, "soma_joinid").to_numpy().copy()),
        weight=_weight(table),
    )
    return batch if max_genes is None else subsample_genes(batch, max_genes, seed=seed)


def subsample_genes(batch: CellBatch, max_genes: int, *, seed: int) -> CellBatch:
    """Keep at most `max_genes` expressed genes of a cell, a function of (seed, joinid).

    library_size stays that of the whole cell. The batch must be on the CPU.
    """
    offsets, joinids = batch.offsets.numpy(), batch.joinids.numpy()
    lengths = np.diff(offsets)
    if lengths.max(initial=0) <= max_genes:
        return batch
    keep = torch.from_numpy(_sampled_entries(offsets, joinids, max_genes, seed))
    kept = np.concatenate([[0], np.cumsum(np.minimum(lengths, max_genes))])
    offsets = torch.from_numpy(kept)
    return replace(batch, offsets=offsets, gene_ids=batch.gene_ids[keep], counts=batch.counts[keep], longest=None)


def measured_group(table: pa.Table) -> Tensor:
    """Return for each cell the row of `IngestedDataset.measured` with the genes that it measured, (b,) int64."""
    return torch.from_numpy(_column(table, LABEL + GROUP).to_numpy().astype(np.int64))


@dataclass(frozen=True)
class PaddedCells:
    """Expressed genes of b cells, padded to the cell with the most, with gene 0 and count 0."""

    gene_ids: Tensor  # (b, s) int64
    counts: Tensor  # (b, s) float32
    lengths: Tensor  # (b,) int64


def padded(cells: CellBatch) -> PaddedCells:
    """Pad on the device that holds the cells: the ragged form is copied to it."""
    longest = int(cells.lengths.max())
    pad = torch.ops.aten._jagged_to_padded_dense_forward  # called by torch.nested, which takes 1.5 times as long
    return PaddedCells(
        pad(cells.gene_ids, [cells.offsets], [longest], 0),
        pad(cells.counts, [cells.offsets], [longest], 0.0),
        cells.lengths,
    )


def to_latent_batch(table: pa.Table, label_names: Sequence[str], *, shape: tuple[int, int]) -> LatentBatch:
    """Collate a table of latents.

    Args:
        table: Columns soma_joinid, latent (float32 or float16), `label:<name>`, log_library_size; weight, or 1 for all.
        shape: (m, e).
    """
    values = _column(table, "latent").flatten().to_numpy()
    return LatentBatch(
        # A copy, as Arrow's memory is read-only; float16 of the disk becomes float32 here, before any network sees it.
        latents=torch.from_numpy(values.reshape(len(table), *shape).astype(np.float32)),
        log_library_size=_float(table, "log_library_size"),
        conditions=_conditions(table, label_names),
        joinids=torch.from_numpy(_column(table, "soma_joinid").to_numpy().copy()),
        weight=_weight(table),
    )


def _sampled_entries(offsets: np.ndarray, joinids: np.ndarray, max_genes: int, seed: int) -> np.ndarray:
    """Return the positions of the entries to keep."""
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
