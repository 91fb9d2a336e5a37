"""Writes `index.parquet`: obs of all shards in one table, so that readers need not open every shard.

It has one row group per shard. Columns: obs_name, shard (its position in the manifest), shard_row, and obs as in the
shards. The categories of a column, including those without cells, are kept in the schema's metadata: Parquet itself
does not keep them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.files import replaces
from scldm.cells.cells import CATEGORIES, INDEX_NAME, INDEX_ROW, INDEX_SHARD, ORDERED
from scldm.cells.shards import Shard, read_part

INDEX = "index.parquet"


def write_index(folder: Path, records: Sequence[dict[str, Any]]) -> str:
    """Write the index of a stage's shards atomically; return its name. Memory: about three times obs of one shard.

    Args:
        records: Records of the shards, in the order of the manifest.
    """
    shards = [Shard(folder / r["file"], r["n_cells"], r["sha256"]) for r in records]
    categories: dict[str, list[Any]] = {}
    ordered: set[str] = set()
    for shard in shards:  # a column's categories may differ between shards
        for column, values in read_part(shard, "obs").items():
            if isinstance(values.dtype, pd.CategoricalDtype):
                known = categories.setdefault(str(column), [])
                known += [c for c in values.cat.categories.tolist() if c not in set(known)]
                ordered |= {str(column)} if values.cat.ordered else set()
    with replaces(folder / INDEX) as tmp:
        writer = None
        try:
            for k, shard in enumerate(shards):
                table = _table(k, read_part(shard, "obs"), categories, ordered)
                writer = writer or pq.ParquetWriter(tmp, table.schema, compression="zstd")
                writer.write_table(table.cast(writer.schema))
        finally:
            if writer is not None:
                writer.close()
    return INDEX


def _table(k: int, obs: pd.DataFrame, categories: dict[str, list[Any]], ordered: set[str]) -> pa.Table:
    columns: dict[str, Any] = {
        INDEX_NAME: pa.array(obs.index.astype(str), pa.string()),
        INDEX_SHARD: pa.array(np.full(len(obs), k, np.int32)),
        INDEX_ROW: pa.array(np.arange(len(obs), dtype=np.int32)),
    }
    for column, values in obs.items():
        if str(column) in categories:
            coded = pd.Categorical(values.astype(object), categories=categories[str(column)])
            codes = pa.array(coded.codes.astype(np.int32), mask=coded.codes < 0)
            columns[str(column)] = pa.DictionaryArray.from_arrays(codes, pa.array(categories[str(column)]))
        else:
            columns[str(column)] = pa.array(values)
    metadata = {CATEGORIES: json.dumps(categories).encode(), ORDERED: json.dumps(sorted(ordered)).encode()}
    return pa.table(columns).replace_schema_metadata(metadata)
