"""What makes one shard of real cells: an actor that holds the models, reads rows and commits what comes of them.

The networks see tiles of cells, cut by their place in the shard: a cell's numbers do not depend on how many are read at
once, nor on which actor makes the shard. A shard is written beside its name and flushed, renamed, and recorded.

Shape letters: b cells of a tile.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from pipeline.core.faults import arm, fault_point
from pipeline.core.files import write_json_atomic
from pipeline.data.loading.blocks import LABEL, SomaReader, SomaRows
from pipeline.data.presence import GROUP
from pipeline.inference.generator import shard_name
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError

NAME, JOINID = "obs_name", "soma_joinid"


@dataclass(frozen=True)
class Tile:
    """Real cells on their way through a model."""

    cells: Any  # CellBatch with all counts, on the device
    seen: Any  # CellBatch that the encoder is shown
    ids: np.ndarray  # (b,) int64: what makes a cell's randomness its own
    conditions: dict[str, Any]  # label -> class ids (b,) of the cells, on the device


@dataclass
class Made:
    """What comes of a tile; every part has one row per cell."""

    counts: sp.csr_matrix | None = None  # (b, g) int32
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    obsm: dict[str, np.ndarray] = field(default_factory=dict)
    obs: dict[str, Any] = field(default_factory=dict)


class Maker(Protocol):
    """A stage's own part: holds models, turns tiles into what is written. class `Maker` of its module."""

    vae: Any  # LoadedVAE
    vocabulary: Vocabulary
    encodes: bool  # whether it looks at a cell's genes
    synthetic: bool  # whether the model made the cells

    def __call__(self, tile: Tile) -> Made: ...


class RowsActor:
    """A Ray Data actor; also called without Ray, with the same effect.

    Args:
        spec: Plain data (`pipeline.inference.apply_job`).
    """

    def __init__(self, spec: dict[str, Any]):
        import torch

        from scldm.generation.cell_maker import tile_cells

        arm(spec["fault"])
        torch.set_num_threads(spec["threads"])
        self.spec, self.folder = spec, Path(spec["folder"])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.reader = SomaReader(**{**spec["reader"], "labels": tuple(spec["reader"]["labels"])})
        self.maker: Maker = importlib.import_module(f"pipeline.stages.{spec['stage']}").Maker(spec, self.device)
        self.measured = None if spec["measured"] is None else torch.from_numpy(spec["measured"]).to(self.device)
        self.tile = tile_cells(self.maker.vae, self.device)
        self.read_at_once = -(-spec["batch_size"] // self.tile) * self.tile

    def __call__(self, shards: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self.make(row["shard"]) for row in shards.to_pylist()])

    def make(self, shard: int) -> dict[str, Any]:
        """Write and commit a shard; its record."""
        adata, n_empty = self.shard(shard)
        file = shard_name(shard)
        path = self.folder / file
        tmp = path.with_name(f".{file}.{os.getpid()}.tmp")
        try:
            adata.write_h5ad(tmp, compression="gzip", compression_opts=1)
            with tmp.open("rb") as f:
                os.fsync(f.fileno())
                sha256 = hashlib.file_digest(f, "sha256").hexdigest()
            fault_point("cells.before_rename")
            tmp.replace(path)
        finally:
            tmp.unlink(missing_ok=True)
        fault_point("cells.before_record")
        record = {"shard": shard, "file": f"cells/{file}", "n_cells": adata.n_obs, "sha256": sha256, "empty": n_empty}
        write_json_atomic(self.folder / f"{file}.json", record)
        fault_point("cells.after_record")
        return record

    def shard(self, shard: int) -> tuple[anndata.AnnData, int]:
        """The cells of a shard, and how many were left out because they express no gene of the model."""
        rows = pq.ParquetFile(self.spec["rows"]).read_row_group(shard)
        made, kept = [], []
        for start in range(0, len(rows), self.read_at_once):
            read = rows.slice(start, self.read_at_once).combine_chunks()
            counts = self._read(read)
            for at in range(0, len(read), self.tile):
                part, names = counts.slice(at, self.tile), read.slice(at, self.tile)
                keep = self._kept(part, names)
                kept.append(keep)
                if keep.any():
                    mask = pa.array(keep)
                    made.append(self._tile(part.filter(mask).combine_chunks(), names[NAME].filter(mask)))
        keep = np.concatenate(kept) if kept else np.zeros(0, bool)
        obs = self._obs(rows.filter(pa.array(keep, pa.bool_())))
        return self._anndata(made, obs), int((~keep).sum())

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

    def _kept(self, counts: pa.Table, rows: pa.Table) -> np.ndarray:
        keep = counts["library_size"].to_numpy() > 0
        if not keep.all() and self.spec["empty_cells"] == "error":
            names = rows[NAME].to_pandas()[~keep]
            raise InputError(
                f"{len(names)} cells express none of the model's genes (first: {', '.join(map(str, names[:5]))}); "
                "leave them out with empty_cells: drop, or check genes.match"
            )
        return keep

    def _tile(self, table: pa.Table, names: pa.ChunkedArray) -> Made:
        from dataclasses import replace

        from pipeline.data.loading.collate import measured_group, to_cell_batch

        labels = [n for n in self.reader.labels if n != GROUP]
        cells = to_cell_batch(table, labels).to(self.device)
        seen = cells
        if self.spec["max_genes"] is not None:
            seen = to_cell_batch(table, labels, max_genes=self.spec["max_genes"], seed=self.spec["seed"])
            seen = seen.to(self.device)
        if self.maker.encodes:
            self._require_room(seen, names)
        if self.measured is not None:
            measured = self.measured[measured_group(table).to(self.device)]
            cells, seen = replace(cells, measured=measured), replace(seen, measured=measured)
        made = self.maker(Tile(cells, seen, table[JOINID].to_numpy(), dict(cells.conditions)))
        made.obs = {"library_size": cells.library_size.cpu().numpy(), **made.obs}
        if made.counts is None:
            made.obs["n_genes"] = cells.lengths.cpu().numpy().astype(np.int32)
        return made

    def _require_room(self, seen: Any, names: pa.ChunkedArray) -> None:
        """Models of upstream take so many tokens and no more."""
        most = self.maker.vae.vae.config.genes_seq_len
        if most is None or int(seen.lengths.max()) <= most:
            return
        long = (seen.lengths > most).cpu().numpy()
        first = ", ".join(names.to_pandas()[long][:5])
        raise InputError(
            f"{int(long.sum())} cells express more genes than the {most} that model.vae takes (first: {first}; up to "
            f"{int(seen.lengths.max())}); set max_genes={most}, which draws so many of them by seed"
        )

    # ---- writing ---------------------------------------------------------------------------------------------------
    def _obs(self, rows: pa.Table) -> pd.DataFrame:
        """Names and columns of the input, in its order."""
        obs = pd.DataFrame(index=pd.Index(rows[NAME].to_pylist(), dtype=str))
        for column in self.spec["obs_columns"]:
            values = rows["obs:" + column].to_pandas()
            categories = self.spec["categories"].get(column)
            if categories is not None:
                values = pd.Categorical(values.astype(object), categories=categories)
            obs[column] = values if categories is not None else values.to_numpy()
        return obs

    def _anndata(self, made: list[Made], obs: pd.DataFrame) -> anndata.AnnData:
        vocabulary = self.maker.vocabulary
        shapes = self.spec["shapes"]
        obs["is_synthetic"] = self.maker.synthetic
        for name in made[0].obs if made else ():
            values = np.concatenate([np.asarray(m.obs[name]) for m in made])
            obs[name] = values
        obsm = {
            k: np.concatenate([np.zeros((0, w), np.float32), *(m.obsm[k] for m in made)]) for k, w in shapes.items()
        }
        x = None
        layers: dict[str, Any] = {}
        if self.spec["genes_out"]:
            var = pd.DataFrame(
                {"feature_name": list(vocabulary.feature_names)},
                index=pd.Index(vocabulary.feature_ids, name="feature_id"),
            )
        else:
            var = pd.DataFrame(index=pd.Index([], dtype=str))
        if self.spec["counts_out"]:
            x = sp.vstack([sp.csr_matrix((0, len(var)), dtype=np.int32), *(m.counts for m in made)], format="csr")
            obs["total_counts"] = np.asarray(x.sum(1)).ravel().astype(np.int64)
            obs["n_genes"] = np.diff(x.indptr).astype(np.int32)
        if self.spec["mean_out"]:
            layers["mean"] = np.concatenate([np.zeros((0, len(var)), np.float32), *(m.layers["mean"] for m in made)])
        uns = {"scldm": json.loads(json.dumps(self.spec["provenance"]))}
        return anndata.AnnData(x, obs=obs, var=var, obsm=obsm, layers=layers, uns=uns)
