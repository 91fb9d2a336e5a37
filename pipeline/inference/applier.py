"""The actor that applies models to real cells: it reads the rows of a shard, and commits what the models make of them.

The networks see tiles of cells, cut by their place in the shard: a cell's numbers depend neither on how many cells are
read at a time nor on which actor makes the shard. A shard is committed as `pipeline.core.shards` describes.

Shape letters: b cells of a tile, g genes of the model, p groups of data sets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from pipeline.config.apply import RealCellsConfig
from pipeline.core.faults import arm
from pipeline.core.shards import CommitPoints, Record, ShardStore
from pipeline.data.loading.blocks import LABEL, SomaReader, SomaRows
from pipeline.data.presence import GROUP
from pipeline.inference.actors.numerics import agree
from pipeline.inference.cell_shards import CELLS, shard_name
from pipeline.inference.models import ModelPaths
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.generation.expression_draw import scale_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from scldm.checkpoints.native import LoadedFlow, LoadedVAE
    from scldm.data.batch import CellBatch
    from scldm.nn.kernels.precision import Numerics

Values = Literal["counts", "log1p_cp10k"]
NAME, JOINID = "obs_name", "soma_joinid"
POINTS = CommitPoints("cells.before_rename", "cells.before_record", "cells.after_record")


def applied_shards(folder: Path) -> ShardStore:
    """Return the store of applied shards, `<stage>/cells`; records name files from the stage's folder."""
    return ShardStore(folder, POINTS, prefix=CELLS)


@dataclass(frozen=True)
class Tile:
    """Real cells that a model is applied to."""

    cells: CellBatch  # all counts, on the device
    seen: CellBatch  # what the encoder is shown: at most max_genes of a cell
    ids: np.ndarray  # (b,) int64, seed of a cell's randomness
    conditions: dict[str, Tensor]  # label -> class ids (b,), on the device


def tile_of(
    table: pa.Table, labels: Sequence[str], *, max_genes: int | None, measured: Tensor | None, seed: int,
    device: torch.device,
) -> Tile:  # fmt: skip
    """Return rows of a reader as cells on a device.

    Args:
        labels: Of the reader, that of the group of data sets too.
        max_genes: Expressed genes of a cell that the encoder sees; None: all.
        measured: Genes that each group of data sets measured, (p, g) bool, on the device; None: all.
        seed: Seed of the genes that are seen.
    """
    from pipeline.data.loading.collate import measured_group, subsample_genes, to_cell_batch

    batch = to_cell_batch(table, [n for n in labels if n != GROUP])
    cells = batch.to(device)
    # Drawn before the copy: the draw depends on the seed and the cell, not on the device.
    seen = cells if max_genes is None else subsample_genes(batch, max_genes, seed=seed).to(device)
    if measured is not None:
        of_cells = measured[measured_group(table).to(device)]
        cells, seen = replace(cells, measured=of_cells), replace(seen, measured=of_cells)
    return Tile(cells, seen, table[JOINID].to_numpy(), dict(cells.conditions))


@dataclass
class TileOutput:
    """What a model made of a tile; every part has one row per cell."""

    values: sp.csr_matrix | None = None  # (b, g) int32 counts, or float32 log1p CP10k of a Gaussian head
    mean: np.ndarray | None = None  # (b, g) float32
    obsm: dict[str, np.ndarray] = field(default_factory=dict)
    obs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputLayout:
    """Which parts of AnnData a stage writes."""

    genes: bool = False  # var holds the model's genes
    values: Values | None = None  # X, if it is written, and its scale
    mean: Values | None = None  # layers["mean"], if it is written, and its scale
    obsm: Mapping[str, int] = field(default_factory=dict)  # name -> width
    obs: Mapping[str, type] = field(default_factory=dict)  # column that the processor adds -> type of its values

    def scale(self) -> dict[str, str]:
        """Return the entry of uns["scldm"] that says that values are no counts."""
        return scale_of("gaussian") if "log1p_cp10k" in (self.values, self.mean) else {}

    def obs_types(self) -> dict[str, type]:
        """Return the types of all columns that tiles bring, so that a shard without cells has them too."""
        genes = {} if self.values == "counts" else {"n_genes": np.int32}
        return {"library_size": np.float32, **self.obs, **genes}

    def own_columns(self) -> set[str]:
        """Return the names of all obs columns that the stage writes itself."""
        return {"is_synthetic", "total_counts", "n_genes", *self.obs_types()}


class TileProcessor(Protocol):
    """A stage's own part of the actor: holds models and turns tiles into output."""

    vocabulary: Vocabulary
    encodes: bool  # whether it reads a cell's genes
    synthetic: bool  # whether the model made the cells

    @property
    def vae(self) -> LoadedVAE | None: ...  # None: no network is used

    @property
    def flow(self) -> LoadedFlow | None: ...

    def __call__(self, tile: Tile) -> TileOutput: ...


@dataclass(frozen=True)
class ApplierSpec:
    """What an actor needs to make any shard; picklable."""

    processor: Callable[[ApplierSpec, torch.device], TileProcessor]  # class of the stage; importable by name
    config: RealCellsConfig
    models: ModelPaths
    layout: OutputLayout
    folder: Path  # of the shards; exists
    rows: Path  # rows.parquet, a row group per shard
    reader: SomaReader
    measured: np.ndarray | None  # genes that each group of data sets measured, (p, g) bool; None: all
    obs_columns: list[str]  # columns of the input that are kept
    categories: dict[str, list[Any]]  # of those columns
    provenance: dict[str, Any]  # uns["scldm"] of every shard
    seed: int
    threads: int  # of torch
    fault: str  # faults to arm, see `pipeline.core.faults`


class Applier:
    """A Ray Data actor that makes shards; can be called without Ray, to the same effect."""

    def __init__(self, spec: ApplierSpec):
        import torch

        from scldm.generation.cell_maker import CPU_TILE, tile_cells

        arm(spec.fault)
        torch.set_num_threads(spec.threads)
        self.spec, self.store = spec, applied_shards(spec.folder)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.reader = spec.reader
        self.processor = spec.processor(spec, self.device)
        self.numerics = None if self.processor.vae is None else self._agree(spec)
        self.measured = None if spec.measured is None else torch.from_numpy(spec.measured).to(self.device)
        vae = self.processor.vae
        self.tile = CPU_TILE if vae is None else tile_cells(vae, self.device)
        self.read_rows = -(-spec.config.batch_size // self.tile) * self.tile  # whole tiles

    def __call__(self, shards: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self.make(row["shard"]) for row in shards.to_pylist()])

    def _agree(self, spec: ApplierSpec) -> Numerics:
        """Set the networks to the precision of the job's cells."""
        from scldm.nn.kernels.precision import set_precision

        numerics = agree(spec.folder, spec.config.precision, self.device, where="precision", solver=spec.config.solver)
        vae, flow = self.processor.vae, self.processor.flow
        for network in (*(() if vae is None else (vae.vae,)), *(() if flow is None else (flow.dit,))):
            set_precision(network, numerics.precision)
        return numerics

    def _made_in(self) -> dict[str, str]:
        return {} if self.numerics is None else self.numerics.as_plain()

    def make(self, shard: int) -> Record:
        """Make and commit a shard; return its record."""
        adata, n_empty = self.apply_to_shard(shard)

        def write(path: Path) -> dict[str, int]:
            adata.write_h5ad(path, compression="gzip", compression_opts=1)
            return {"shard": shard, "n_cells": adata.n_obs, "empty": n_empty, **self._made_in()}

        return self.store.commit(shard_name(shard), write)

    def apply_to_shard(self, shard: int) -> tuple[anndata.AnnData, int]:
        """Return the cells of a shard, and how many were left out because they express no gene of the model."""
        rows = pq.ParquetFile(self.spec.rows).read_row_group(shard)
        outputs, kept = [], []
        for start in range(0, len(rows), self.read_rows):
            read = rows.slice(start, self.read_rows).combine_chunks()
            counts = self._read(read)
            for at in range(0, len(read), self.tile):
                part, names = counts.slice(at, self.tile), read.slice(at, self.tile)
                keep = self._not_empty(part, names)
                kept.append(keep)
                if keep.any():
                    mask = pa.array(keep)
                    outputs.append(self._apply(part.filter(mask).combine_chunks(), names[NAME].filter(mask)))
        keep = np.concatenate(kept) if kept else np.zeros(0, bool)
        obs = self._obs(rows.filter(pa.array(keep, pa.bool_())))
        return self._anndata(outputs, obs), int((~keep).sum())

    # ---- reading ---------------------------------------------------------------------------------------------------
    def _read(self, rows: pa.Table) -> pa.Table:
        codes = {name: rows[LABEL + name].to_numpy().astype(np.int32) for name in self.reader.labels}
        table = self.reader.read(SomaRows(rows[JOINID].to_numpy().astype(np.int64), codes)).combine_chunks()
        values = table["count"].combine_chunks().flatten().to_numpy()
        if (bad := ~np.isfinite(values) | (values < 0) | (values != np.rint(values))).any():
            lengths = np.diff(table["gene"].combine_chunks().offsets.to_numpy())
            cell = int(np.repeat(np.arange(len(table)), lengths)[bad][0])
            raise InputError(
                f"source: {int(bad.sum())} values of {len(table)} cells are no raw counts, the first is "
                f"{values[bad][0]:g} in cell {rows[NAME][cell].as_py()}; name the measurement or layer of raw counts"
            )
        return table

    def _not_empty(self, counts: pa.Table, rows: pa.Table) -> np.ndarray:
        """Return which cells express a gene of the model, bool (b,)."""
        keep = counts["library_size"].to_numpy() > 0
        if not keep.all() and self.spec.config.empty_cells == "error":
            names = rows[NAME].to_pandas()[~keep]
            raise InputError(
                f"{len(names)} cells express none of the model's genes (first: {', '.join(map(str, names[:5]))}); "
                "leave them out with empty_cells: drop, or check genes.match"
            )
        return keep

    def _apply(self, table: pa.Table, names: pa.ChunkedArray) -> TileOutput:
        tile = tile_of(
            table, self.reader.labels, max_genes=self.spec.config.max_genes, measured=self.measured,
            seed=self.spec.seed, device=self.device,
        )  # fmt: skip
        if self.processor.encodes:
            self._require_few_genes(tile.seen, names)
        output = self.processor(tile)
        cells = tile.cells
        output.obs = {"library_size": cells.library_size.cpu().numpy(), **output.obs}
        if self.spec.layout.values != "counts":
            output.obs["n_genes"] = cells.lengths.cpu().numpy().astype(np.int32)
        return output

    def _require_few_genes(self, seen: CellBatch, names: pa.ChunkedArray) -> None:
        """Refuse cells with more genes than a model of upstream takes."""
        assert self.processor.vae is not None  # it encodes
        most = self.processor.vae.vae.config.genes_seq_len
        if most is None or int(seen.lengths.max()) <= most:
            return
        too_long = (seen.lengths > most).cpu().numpy()
        first = ", ".join(names.to_pandas()[too_long][:5])
        raise InputError(
            f"{int(too_long.sum())} cells express more genes than the {most} that model.vae takes (first: {first}; up "
            f"to {int(seen.lengths.max())}); set max_genes={most}, which draws that many of them by seed"
        )

    # ---- writing ---------------------------------------------------------------------------------------------------
    def _obs(self, rows: pa.Table) -> pd.DataFrame:
        """Return names and kept columns of the input, in its order."""
        obs = pd.DataFrame(index=pd.Index(rows[NAME].to_pylist(), dtype=str))
        for column in self.spec.obs_columns:
            values = rows["obs:" + column].to_pandas()
            categories = self.spec.categories.get(column)
            if categories is not None:
                values = pd.Categorical(values.astype(object), categories=categories)
            obs[column] = values if categories is not None else values.to_numpy()
        return obs

    def _anndata(self, outputs: list[TileOutput], obs: pd.DataFrame) -> anndata.AnnData:
        vocabulary, layout = self.processor.vocabulary, self.spec.layout
        obs["is_synthetic"] = self.processor.synthetic
        for name, kind in layout.obs_types().items():
            obs[name] = np.concatenate([np.zeros(0, kind), *(np.asarray(o.obs[name]) for o in outputs)])
        obsm = {
            k: np.concatenate([np.zeros((0, width), np.float32), *(o.obsm[k] for o in outputs)])
            for k, width in layout.obsm.items()
        }
        if layout.genes:
            var = pd.DataFrame(
                {"feature_name": list(vocabulary.feature_names)},
                index=pd.Index(vocabulary.feature_ids, name="feature_id"),
            )
        else:
            var = pd.DataFrame(index=pd.Index([], dtype=str))
        x, layers = None, {}
        if layout.values is not None:
            kind = np.int32 if layout.values == "counts" else np.float32
            x = sp.vstack([sp.csr_matrix((0, len(var)), dtype=kind), *(o.values for o in outputs)], format="csr")
        if x is not None and layout.values == "counts":
            obs["total_counts"] = np.asarray(x.sum(1)).ravel().astype(np.int64)
            obs["n_genes"] = np.diff(x.indptr).astype(np.int32)
        if layout.mean:
            means = (o.mean for o in outputs if o.mean is not None)
            layers["mean"] = np.concatenate([np.zeros((0, len(var)), np.float32), *means])
        uns = {"scldm": json.loads(json.dumps({**self.spec.provenance, **self._made_in()}))}
        return anndata.AnnData(x, obs=obs, var=var, obsm=obsm, layers=layers, uns=uns)
