"""Reads counts, obs and var from TileDB-SOMA. Writers: `write.py` and `inference/export/soma.py`.

Convention: a store is described by plain data (`SomaStore`), so that it can be sent to workers; open arrays are kept
per process. Rows are stored in tiles of 2,048 cells and should be read by whole tiles (one row costs as much as a
tile). TileDB is never asked to sort its result, which takes 17 times as long: rows get their order when they are
assembled (`assemble.py`).
"""

from __future__ import annotations

import json
import keyword
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import DTypeLike

from pipeline.config.s3 import S3Config
from pipeline.data.entries import CountEntries
from pipeline.data.soma.assemble import PlacedEntries, Ragged, assemble
from pipeline.data.soma.library import soma
from pipeline.data.soma.retry import survives_faults
from pipeline.data.soma.s3_errors import failure
from scldm.errors import InputError

TILE = 2048
NO_MEMORY = "std::bad_alloc"
SCATTERED = 64  # with fewer ids per tile, a point query reads less than the range of the ids
READ_CONFIG: dict[str, Any] = {
    **S3Config().tiledb(),
    "soma.init_buffer_bytes": 256 << 20,
    "sm.mem.reader.sparse_global_order.ratio_array_data": 0.3,
    "sm.compute_concurrency_level": 2,  # the default is every core in every process
    "sm.io_concurrency_level": 4,
}
_OPEN: dict[tuple, Any] = {}


@dataclass(frozen=True)
class SomaStore:
    """A SOMA experiment and where its counts are; picklable.

    TileDB shows what was written before a point in time, by default now, by the clock of the reader: if that clock is
    behind the writer's, an experiment is empty. So a reader whose clock is behind `seen_at` (milliseconds since 1970),
    when the experiment is known to have existed, reads as of `seen_at`.
    """

    uri: str
    tiledb_config: Mapping[str, Any] = field(default_factory=dict)
    measurement: str = "RNA"
    layer: str = "raw"
    seen_at: int = 0

    def forget(self) -> None:
        """Close the handles of this process; the next read opens the store again."""
        for key in [k for k in _OPEN if k[0] == self.uri]:
            del _OPEN[key]

    @survives_faults
    def _open(self, part: str) -> Any:
        key = (self.uri, part, tuple(sorted(self.tiledb_config.items())))
        if key not in _OPEN:
            at = self.seen_at if self.seen_at > time.time() * 1000 else None
            context = soma.SOMATileDBContext(tiledb_config={**READ_CONFIG, **self.tiledb_config}, timestamp=at)
            try:
                _OPEN[key] = soma.open(f"{self.uri.rstrip('/')}/{part}", context=context)
            except (soma.DoesNotExistError, soma.SOMAError) as error:
                if failure(error).kind != "other":
                    raise  # from the object store: repeated or explained by `survives_faults`
                if "__fragments" in str(error) or NO_MEMORY in str(error):
                    raise self._damaged(part, error) from error
                raise InputError(
                    f"cannot open {part} of the SOMA experiment {self.uri} ({error}); check ingest.source: uri, "
                    "measurement and layer name an experiment written by tiledbsoma"
                ) from error
        return _OPEN[key]

    def _damaged(self, part: str, error: Exception) -> InputError | MemoryError:
        first = " ".join(str(error).split())[:300]
        if NO_MEMORY in first:  # TileDB reports it like any other error
            return MemoryError(f"no memory to read {part} of the SOMA experiment {self.uri} ({first})")
        return InputError(
            f"{part} of the SOMA experiment {self.uri} is damaged: a file of it is missing or changed ({first}); copy "
            "or write the experiment again"
        )

    @property
    def counts(self) -> Any:
        """The open array of counts."""
        return self._open(f"ms/{self.measurement}/X/{self.layer}")

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Number of cells and genes."""
        return tuple(self.counts.shape)

    @cached_property
    def tile(self) -> int:
        """Number of cells in a storage tile, as the array was created."""
        dims = json.loads(self.counts.schema_config_options().dims)
        return int(dims["soma_dim_0"]["tile"])

    @survives_faults
    def names(self, part: str) -> list[str]:
        """Return the names in a collection, `ms` or `ms/<measurement>/X`."""
        return sorted(self._open(part))

    def obs_columns(self) -> list[str]:
        """Return the names of the columns of obs."""
        return list(self._open("obs").schema.names)

    def categories(self, column: str) -> list[Any] | None:
        """Return the categories of an obs column; None if it is not categorical."""
        frame = self._open("obs")
        if not pa.types.is_dictionary(frame.schema.field(column).type):
            return None
        return frame.get_enumeration_values([column])[column].to_pylist()

    def kind(self, column: str) -> Literal["text", "number", "boolean", "other"]:
        """Return what an obs column that is not categorical holds."""
        type_ = self._open("obs").schema.field(column).type
        if pa.types.is_boolean(type_):
            return "boolean"
        if pa.types.is_integer(type_) or pa.types.is_floating(type_):
            return "number"
        return "text" if pa.types.is_string(type_) or pa.types.is_large_string(type_) else "other"

    def obs(self, columns: Sequence[str] | None = None, value_filter: str | None = None) -> pd.DataFrame:
        """Return the cells that pass a filter, ascending by soma_joinid; `columns` plus soma_joinid."""
        return self._table("obs", columns, value_filter, "ingest.obs_filter")

    def var(self, columns: Sequence[str] | None = None, value_filter: str | None = None) -> pd.DataFrame:
        """Return the genes that pass a filter, ascending by soma_joinid."""
        return self._table(f"ms/{self.measurement}/var", columns, value_filter, "ingest.genes.value_filter")

    def measured_by(self, dataset_ids: Sequence[str]) -> np.ndarray | None:
        """Return which genes each data set measured, (datasets, genes) bool; None if the store does not record it.

        The layout is that of the Census: feature_dataset_presence_matrix is in the measurement of X, and its rows are
        numbered by the table of data sets, census_info/datasets (in another experiment: its own `datasets`).
        """
        if "feature_dataset_presence_matrix" not in self._open(f"ms/{self.measurement}"):
            return None
        census, is_census, _ = self.uri.rstrip("/").rpartition("/census_data/")
        info = SomaStore(f"{census}/census_info" if is_census else self.uri, self.tiledb_config)
        table = info._table("datasets", ["dataset_id"], None, "")
        number = pd.Series(table["soma_joinid"].to_numpy(), index=table["dataset_id"].astype(str))
        if lacking := [d for d in dataset_ids if d not in number.index]:
            raise InputError(f"{info.uri}/datasets does not know {len(lacking)} data sets (first: {lacking[0]})")
        rows = number.loc[list(dataset_ids)].to_numpy(np.int64)
        measured = np.zeros((int(number.max()) + 1, self.shape[1]), bool)
        array = self._open(f"ms/{self.measurement}/feature_dataset_presence_matrix")
        for part in array.read(coords=(pa.array(np.sort(rows)),)).tables():
            measured[part["soma_dim_0"].to_numpy(), part["soma_dim_1"].to_numpy()] = part["soma_data"].to_numpy() != 0
        return measured[rows]

    @survives_faults
    def _table(self, part: str, columns: Sequence[str] | None, value_filter: str | None, name: str) -> pd.DataFrame:
        frame = self._open(part)
        wanted = None if columns is None else list(dict.fromkeys(["soma_joinid", *columns]))
        try:
            table = frame.read(column_names=wanted, value_filter=value_filter or None).concat().to_pandas()
        except (soma.SOMAError, pa.ArrowException, SyntaxError, RuntimeError, ValueError, TypeError) as error:
            if failure(error).kind != "other":
                raise
            if not value_filter or NO_MEMORY in str(error):
                raise self._damaged(part, error) from error
            names = frame.schema.names
            odd = next((c for c in names if not c.isidentifier() or keyword.iskeyword(c)), None)
            quoted = "" if odd is None else f", and a column whose name is no plain word is written attr({odd!r})"
            raise InputError(
                f"{name} {value_filter!r} cannot be applied ({str(error).splitlines()[0]}); it compares columns with "
                f"values, as in \"cell_type == 'B'\"{quoted}; columns: {', '.join(names)}"
            ) from error
        return table.sort_values("soma_joinid", ignore_index=True)

    @survives_faults
    def read_ragged(
        self,
        ids: np.ndarray,
        gene_lut: np.ndarray | None = None,
        *,
        gene_type: DTypeLike = np.int32,
        count_type: DTypeLike = np.float32,
    ) -> Ragged:
        """Return the counts of cells, in the order of `ids`; repeats are allowed.

        Args:
            ids: soma_joinids, (n,).
            gene_lut: var soma_joinid -> gene id, -1 drops the gene; None keeps the joinids.

        Raises:
            CountsChanged: `count_type` is an integer type and a count is not whole, or is too large.
        """
        unique, inverse = np.unique(ids, return_inverse=True)
        if len(unique) < len(ids):
            kept = self.read_ragged(unique, gene_lut, gene_type=gene_type, count_type=count_type)
            return _take_rows(kept, inverse)
        lut = np.arange(self.shape[1], dtype=np.int32) if gene_lut is None else gene_lut
        results = _read_entries(self.counts, unique, tile=self.tile, row_of=np.argsort(ids, kind="stable"))
        try:
            return assemble(results, len(ids), lut, gene_type=gene_type, count_type=count_type)
        except soma.SOMAError as error:
            if failure(error).kind != "other":
                raise
            raise self._damaged(f"ms/{self.measurement}/X/{self.layer}", error) from error


def _read_entries(array: Any, ids: np.ndarray, *, tile: int, row_of: np.ndarray) -> Iterator[PlacedEntries]:
    """Read the entries of some cells.

    Args:
        ids: Sorted and unique.
        row_of: Row that each of `ids` becomes.
    """
    cuts = np.flatnonzero(np.diff(ids // tile) > 1) + 1  # neighbouring tiles are read together
    starts, stops = np.r_[0, cuts], np.r_[cuts, len(ids)]
    if len(ids) < SCATTERED * len(starts) and len(starts) > 1:
        for e in _query(array, pa.array(ids)):
            yield PlacedEntries(0, row_of, CountEntries(np.searchsorted(ids, e.cells), e.genes, e.counts))
        return
    for a, b in zip(starts, stops, strict=True):
        first, last = int(ids[a]), int(ids[b - 1])
        rows = np.full(last - first + 1, -1, dtype=np.int64)
        rows[ids[a:b] - first] = row_of[a:b]
        for e in _query(array, slice(first, last)):
            yield PlacedEntries(first, rows, e)


def _query(array: Any, cells: pa.Array | slice) -> Iterator[CountEntries]:
    for table in array.read(coords=(cells,)).tables():
        for batch in table.to_batches():  # no copy
            yield CountEntries(*(batch[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data")))


def _take_rows(rows: Ragged, index: np.ndarray) -> Ragged:
    """Return rows by position; repeats are allowed."""
    lengths = np.diff(rows.indptr)[index]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    entries = np.arange(indptr[-1]) + np.repeat(rows.indptr[:-1][index] - indptr[:-1], lengths)
    return Ragged(indptr, rows.genes[entries], rows.counts[entries])
