"""Generated cells as one lazy object over any number of shards.

    cells = scldm.open_cells("runs/demo/generate/1a2b3c4d5e6f")
    cells.obs                          # one table, from the index
    b = cells.where(cell_type="B")     # AnnData in memory, only those cells
    for part in cells.batches(10_000): ...

Rows are read on request: memory holds obs and the requested rows.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from scldm.cells.shards import CellShardsError, CellsManifest, Shard, read_cells_manifest, read_part, read_rows
from scldm.data.class_names import class_name, class_names, is_null
from scldm.errors import extra

with extra("cells"):
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["CellShardsError", "Cells", "open_cells"]

LARGE = 1_000_000  # more cells are only read into memory if `max_cells` is raised
CATEGORIES = b"scldm.categories"  # in the metadata of an index: column -> its categories, used or not
ORDERED = b"scldm.ordered"  # likewise: columns whose categories have an order
INDEX_NAME, INDEX_SHARD, INDEX_ROW = "obs_name", "shard", "shard_row"


def open_cells(folder: str | Path) -> Cells:
    """Open the cells of a finished stage: generate, embed, reconstruct, perturb or log_likelihood.

    Args:
        folder: The stage's folder, which holds manifest.json. Only files that the manifest lists are read.

    Raises:
        CellShardsError: The folder holds no finished stage of cells, or one of a newer version of this code.
    """
    return Cells(read_cells_manifest(folder))


class Cells:
    """Cells of many shards, in the order of the manifest."""

    def __init__(self, manifest: CellsManifest):
        self.manifest = manifest
        self.folder = manifest.folder
        self.shards: tuple[Shard, ...] = manifest.shards
        self._ends = np.cumsum([0, *(s.n_cells for s in self.shards)])

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return int(self._ends[-1])

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return len(self.var)

    @property
    def shape(self) -> tuple[int, int]:
        """(n_obs, n_vars)."""
        return self.n_obs, self.n_vars

    def __len__(self) -> int:
        return self.n_obs

    def __repr__(self) -> str:
        columns = ", ".join(map(str, self.obs.columns))
        return (
            f"Cells {self.n_obs:,} x {self.n_vars:,} in {len(self.shards)} shards of {self.folder}\n    obs: {columns}"
        )

    @cached_property
    def obs(self) -> pd.DataFrame:
        """Return one row per cell with the categories of the model; read from the index if there is one."""
        if self.manifest.index is not None:
            return self._checked(read_index(self.manifest.index), self.manifest.index)
        return self._checked(concat_obs([read_part(s, "obs") for s in self.shards]), self.folder)

    @property
    def obs_names(self) -> pd.Index:
        """Names of the cells."""
        return self.obs.index

    @cached_property
    def var(self) -> pd.DataFrame:
        """Return the genes, which are the same in every shard."""
        return read_part(self.shards[0], "var") if self.shards else pd.DataFrame()

    @cached_property
    def uns(self) -> dict[str, Any]:
        """Return the provenance (`uns["scldm"]`) of the first shard."""
        return read_part(self.shards[0], "uns") if self.shards else {}

    def __getitem__(self, key: Any) -> anndata.AnnData:
        """Read cells into memory, in the given order.

        Args:
            key: A slice, a position, positions, a boolean mask (array or column of obs), or obs names.
        """
        rows = self.rows(key)
        parts = []
        shard_of = np.searchsorted(self._ends, rows, side="right") - 1
        order = np.argsort(shard_of, kind="stable")
        for k in np.unique(shard_of):
            at = order[shard_of[order] == k]
            local = rows[at] - self._ends[k]
            parts.append(read_rows(self.shards[k], local, self.obs.iloc[rows[at]]))
        if not parts:
            return self._nothing()
        joined = parts[0] if len(parts) == 1 else anndata.concat(parts, merge="same", uns_merge="same")
        joined.obs = _used(self.obs.iloc[rows[order]])
        if (order == np.arange(len(order))).all():
            return joined
        return joined[np.argsort(order, kind="stable")].copy()

    def rows(self, key: Any) -> np.ndarray:
        """Return the positions of the cells of a key, int64."""
        if isinstance(key, slice):
            return np.arange(self.n_obs)[key]
        if isinstance(key, pd.Series) and key.dtype == bool:
            key = key.reindex(self.obs_names).to_numpy() if not key.index.equals(self.obs_names) else key.to_numpy()
        values = np.atleast_1d(np.asarray(key))
        if values.dtype == bool:
            if len(values) != self.n_obs:
                raise IndexError(f"a mask must have one value per cell ({self.n_obs:,}); got {len(values):,}")
            return np.flatnonzero(values)
        if values.dtype.kind in "OUS":
            return self._named(values)
        if not len(values):
            return np.zeros(0, np.int64)
        if values.dtype.kind not in "iu" or values.max() >= self.n_obs or values.min() < -self.n_obs:
            raise IndexError(f"positions must be whole numbers below {self.n_obs:,}; got {values[:3]}")
        return np.where(values < 0, values + self.n_obs, values).astype(np.int64)

    def where(self, **conditions: Any) -> anndata.AnnData:
        """Read cells whose obs columns have a value, or one of a list: `where(cell_type=["B", "NK"])`."""
        return self[self.mask(**conditions)]

    def mask(self, **conditions: Any) -> np.ndarray:
        """Return which cells meet all conditions, bool (n,).

        Values are compared by the name of their class, as everywhere: 1, 1.0 and "1" are one class, and so are 0.1 and
        float32(0.1). A column that obs lacks, and a value that it does not have, is a KeyError.
        """
        chosen = np.ones(self.n_obs, bool)
        for column, wanted in conditions.items():
            if column not in self.obs:
                raise KeyError(f"obs has no column {column!r}; it has {', '.join(map(str, self.obs.columns))}")
            values = list(wanted) if isinstance(wanted, (list, tuple, set, np.ndarray, pd.Index)) else [wanted]
            chosen &= _has_class(self.obs[column], values)
        return chosen

    def batches(self, size: int = 10_000, key: Any = slice(None)) -> Iterator[anndata.AnnData]:
        """Yield the cells of a key, `size` at a time; memory holds one batch."""
        if isinstance(size, (bool, np.bool_)) or not isinstance(size, (int, np.integer)) or size < 1:
            raise CellShardsError(f"size must be a whole number >= 1; got {size!r}")
        rows = self.rows(key)
        for start in range(0, len(rows), size):
            yield self[rows[start : start + size]]

    def to_anndata(self, *, max_cells: int = LARGE) -> anndata.AnnData:
        """Read all cells into memory; refused above `max_cells`."""
        if self.n_obs > max_cells:
            raise CellShardsError(
                f"{self.n_obs:,} cells are more than max_cells ({max_cells:,}): take some (cells[rows], cells.where, "
                "cells.batches), raise max_cells, or export them: "
                f"scldm cells export {_quoted(self.folder)} cells.zarr --to zarr"
            )
        return self[:]

    def _named(self, names: np.ndarray) -> np.ndarray:
        found = self.obs_names.get_indexer(names.astype(str))
        if (found < 0).any():
            raise KeyError(f"{int((found < 0).sum())} names are of no cell, the first is {names[found < 0][0]!r}")
        return found.astype(np.int64)

    def _nothing(self) -> anndata.AnnData:
        if not self.shards:
            return anndata.AnnData(obs=self.obs, var=self.var)
        return read_rows(self.shards[0], np.zeros(0, np.int64), self.obs.iloc[:0])

    def _checked(self, obs: pd.DataFrame, where: Path) -> pd.DataFrame:
        if len(obs) != self.n_obs:
            raise CellShardsError(
                f"{where} has {len(obs):,} cells and the manifest {self.n_obs:,}; "
                f"`scldm cells verify {_quoted(self.folder)}` says what is wrong"
            )
        return obs


def _quoted(path: Path) -> str:
    """Return a path as a command line takes it."""
    return shlex.quote(str(path))


def _has_class(column: pd.Series, values: Sequence[Any]) -> np.ndarray:
    """Return which cells have one of some values, bool (n,); a null asks for the cells without a value."""
    names = class_names(column)
    categorical = isinstance(column.dtype, pd.CategoricalDtype)
    known = class_names(column.cat.categories) if categorical else pd.unique(names[~pd.isna(names)])
    wanted = [class_name(v) for v in values if not is_null(v)]
    unknown = pd.Index(wanted).difference(pd.Index(known), sort=False)
    if len(unknown):
        has = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
        raise KeyError(f"{column.name} has no class {unknown[0]!r}; it has {has or 'no value in any cell'}")
    met = pd.Series(names).isin(wanted).to_numpy(bool)
    return met | pd.isna(names) if len(wanted) < len(values) else met


def _used(obs: pd.DataFrame) -> pd.DataFrame:
    """Return obs with the categories that its cells have, as a slice of anndata; scanpy's tests refuse empty groups."""
    obs = obs.copy()
    for column in obs.columns:
        if isinstance(obs[column].dtype, pd.CategoricalDtype):
            obs[column] = obs[column].cat.remove_unused_categories()
    return obs


# ---- index -------------------------------------------------------------------------------------------------------
def read_index(path: Path) -> pd.DataFrame:
    """Read obs from an index that the pipeline's `write_index` wrote."""
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise CellShardsError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    metadata = table.schema.metadata or {}
    categories, ordered = json.loads(metadata.get(CATEGORIES, b"{}")), json.loads(metadata.get(ORDERED, b"[]"))
    table = table.drop_columns([INDEX_SHARD, INDEX_ROW])
    obs = table.to_pandas().set_index(INDEX_NAME)
    obs.index.name = None
    for column in table.column_names:
        if column in categories:
            values = obs[column].astype(object)
            obs[column] = pd.Categorical(values, categories=categories[column], ordered=column in ordered)
        elif table[column].null_count and (kind := _nullable(table[column].type)):
            obs[column] = pd.array(table[column].to_pylist(), dtype=kind)
    return obs


def _nullable(kind: pa.DataType) -> str | None:
    """Return the pandas type for a column with gaps, which would else become floats or objects; None keeps that."""
    if pa.types.is_boolean(kind):
        return "boolean"
    return str(kind).replace("uint", "UInt").replace("int", "Int") if pa.types.is_integer(kind) else None


def concat_obs(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Concatenate obs of shards; categories are united in the order of the shards."""
    if not frames:
        return pd.DataFrame()
    out = pd.concat(frames)
    for column in frames[0]:
        if all(isinstance(f[column].dtype, pd.CategoricalDtype) for f in frames):
            known = dict.fromkeys(c for f in frames for c in f[column].cat.categories)
            ordered = all(f[column].cat.ordered for f in frames)
            out[column] = pd.Categorical(out[column].astype(object), categories=list(known), ordered=ordered)
    return out
