"""The ways of reading the same cells that the data benchmark compares. A call reads and returns a number of cells."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import tiledbsoma as soma
from cells_on_disk import MEAN_EXPRESSED, SHARD_CELLS, CellsOnDisk
from rounds import Side

from pipeline.data.loading.cache import cached
from pipeline.data.loading.cache_writer import CacheInput, write_cache
from pipeline.data.loading.collate import padded, to_cell_batch
from pipeline.data.loading.feed import feed
from pipeline.data.loading.order import FeedOrder
from pipeline.data.soma.store import TILE, SomaStore

BATCH, LANES = 128, 4
CHUNK = 64  # tiledbsoma-ml's default shuffle_chunk_size
LABELS = ["cell_type"]


def scan(cells: CellsOnDisk) -> Side:
    """Every entry of the experiment, as tiledbsoma hands it over by itself: the limit."""
    uri = str(cells.soma / "ms" / "RNA" / "X" / "raw")

    def run() -> int:
        with soma.open(uri) as array:
            for _ in array.read(coords=(slice(0, cells.n_cells - 1),)).tables():
                pass
        return cells.n_cells

    return Side("scan", run, note="tiledbsoma, sequential, Arrow tables as they come")


def stream(
    name: str,
    source: Any,
    *,
    block_rows: int,
    engine: Literal["local", "ray"],
    pad: bool,
    note: str,
    epochs: int = 1,
) -> Side:
    """Epochs of ours, shuffled, as the only worker of a training run gets them."""

    def run() -> int:
        for table in tables(source, block_rows=block_rows, engine=engine, epochs=epochs):
            if pad:
                padded(to_cell_batch(table, LABELS))
        return len(source.ids) * epochs  # the repeats that fill the last batch do not count

    return Side(name, run, tree=engine == "ray", note=note)


def tables(source: Any, *, block_rows: int, engine: Literal["local", "ray"], epochs: int = 1) -> Iterator[pa.Table]:
    """The micro batches of the first epochs."""
    order = FeedOrder(source.ids, source.tile, seed=0, batch_size=BATCH, lanes=LANES, block_rows=block_rows)
    steps = feed(
        source, order, rank=0, world_size=1, start_step=0, stop_step=epochs * order.n_steps_per_epoch,
        micro_batch_size=BATCH, engine=engine,
    )  # fmt: skip
    for step in steps:
        yield from step.micro


def cache_of(cells: CellsOnDisk) -> Any:
    """The cells in our local cache, written on first use."""
    source = cells.source()
    sums = SomaStore(str(cells.soma)).obs(["raw_sum"])["raw_sum"].to_numpy(np.float32)
    everything = CacheInput(source, sums, {"benchmark": cells.folder.name}, mean_expressed=MEAN_EXPRESSED)
    made = write_cache(everything, cells.folder / "cache")
    return cached(source, made.folder, source.ids)


def tiledbsoma_ml(cells: CellsOnDisk) -> Side | None:
    """Its default shuffle: chunks of 64 consecutive cells in random order, 65,536 cells in its buffer.

    Of 60 million cells the chunks in the buffer lie in as many different storage tiles. Here the buffer would hold the
    whole experiment and each tile would be read once for 32 chunks, as never at scale; so it is given one chunk of each
    tile, and pays for a tile per chunk as it does at scale. It may return sparse batches, which are the faster.
    """
    if find_spec("tiledbsoma_ml") is None:
        return None
    from tiledbsoma_ml import ExperimentDataset, experiment_dataloader
    from tiledbsoma_ml._query_ids import QueryIDs
    from tiledbsoma_ml.x_locator import XLocator

    starts = np.arange(0, cells.n_cells - TILE + 1, TILE) + TILE // 2
    ids = (starts[:, None] + np.arange(CHUNK)).ravel()
    where = XLocator(
        uri=str(cells.soma), measurement_name="RNA", layer_name="raw", tiledb_timestamp_ms=None, tiledb_config={}
    )
    dataset = ExperimentDataset(
        x_locator=where,
        query_ids=QueryIDs(obs_joinids=ids, var_joinids=np.arange(cells.n_genes)),
        obs_column_names=["soma_joinid"], batch_size=BATCH, shuffle=True, shuffle_chunk_size=CHUNK, seed=0,
        return_sparse_X=True,
    )  # fmt: skip

    def run() -> int:
        return sum(x.shape[0] for x, _ in experiment_dataloader(dataset, num_workers=0))

    return Side(
        "tiledbsoma_ml", run, note=f"{len(starts)} chunks of {CHUNK}, one per tile as at Census scale; sparse out"
    )


def cellarium(cells: CellsOnDisk) -> Side:
    """cellarium-ml's data set: shards in random order, rows shuffled inside; sparse batches, which are the faster."""
    from cellarium.ml.data import DistributedAnnDataCollection, IterableDistributedAnnDataCollectionDataset
    from cellarium.ml.utilities.data import AnnDataField

    last = cells.n_cells - (len(cells.shards) - 1) * SHARD_CELLS
    shards = DistributedAnnDataCollection(
        cells.shards, shard_size=SHARD_CELLS, last_shard_size=last, max_cache_size=2, cache_size_strictly_enforced=True
    )
    dataset = IterableDistributedAnnDataCollectionDataset(
        shards, batch_keys={"x": AnnDataField(attr="X", convert_fn=_as_it_is)}, batch_size=BATCH,
        iteration_strategy="cache_efficient", shuffle=True, shuffle_seed=0,
    )  # fmt: skip

    def run() -> int:
        shards.cache.clear()  # every epoch reads its shards, as where they do not all fit
        return sum(batch["x"].shape[0] for batch in dataset)

    return Side("cellarium", run, note=f"h5ad shards of {SHARD_CELLS}, uncompressed; sparse out, not padded")


def _as_it_is(x: Any) -> Any:
    return x


def absent() -> list[str]:
    """Which rivals are not here, and why."""
    missing = []
    if find_spec("tiledbsoma_ml") is None:
        missing.append("tiledbsoma-ml is not installed: pip install --constraint constraints.txt -e '.[bench]'")
    if find_spec("annbatch") is None:
        missing.append("annbatch is not installed: it needs Python 3.12 or newer")
    return missing
