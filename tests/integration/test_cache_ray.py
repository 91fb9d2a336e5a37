"""The cache and the statistics over Ray: what one process makes."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest import statistics
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.loading import cache_writer as writer
from pipeline.data.loading.cache import CacheBlocks
from pipeline.data.loading.cache_writer import CacheInput, write_cache
from pipeline.data.loading.feed import feed
from pipeline.data.loading.order import FeedOrder
from pipeline.stages import ingest
from scldm.errors import InputError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def ingested(tmp_path_factory, ray_cluster):
    """Four tiles, cached by Ray tasks in shards of one tile."""
    folder = tmp_path_factory.mktemp("ingest")
    config = {"source": {"type": "synthetic", "n_cells": 8000, "n_genes": 50}, "cache": str(folder / "cache")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_ROWS", 2048)
        context = StageContext(folder, {}, 0, SimpleNamespace(), None)
        facts = ingest.run(IngestConfig.model_validate(config), context)
    assert facts["cache"]["shards"] == 4
    return IngestedDataset.open(Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0))


def test_cached_batches_through_ray_are_those_streamed_from_soma(ingested):
    soma, cache = ingested.streamed("train"), ingested.blocks("train")
    assert isinstance(cache, CacheBlocks)
    order = FeedOrder(cache.ids, cache.tile, seed=2, batch_size=128, lanes=4, block_rows=512)
    stop = 2 * order.n_steps_per_epoch
    settings = {"rank": 0, "world_size": 1, "start_step": 0, "stop_step": stop, "micro_batch_size": 128}
    sides = [
        feed(cache, order, **settings, engine="ray"),
        feed(soma, order, **settings, engine="ray"),
        feed(cache, order, **settings, engine="local"),
    ]
    n = 0
    for a, b, c in zip(*sides, strict=True):
        assert (a.step, a.epoch, a.real_cells) == (b.step, b.epoch, b.real_cells)
        assert all(x.equals(y) and x.equals(z) for x, y, z in zip(a.micro, b.micro, c.micro, strict=True))
        n += 1
    assert n == stop


def test_ray_and_one_process_write_the_same_bytes(ingested, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_ROWS", 2048)
    monkeypatch.setattr(writer, "cluster_is_up", lambda: False)
    made = Path(ingested.facts["cache"]["folder"])
    cells = CacheInput(
        ingested.all_blocks(),
        ingested.cells["library_size"].to_numpy(np.float32),
        {},
        ingested.facts["mean_expressed_genes"],
    )
    again = write_cache(cells, tmp_path).folder
    shards = sorted(p.name for p in made.glob("*.arrow"))
    assert shards == sorted(p.name for p in again.glob("*.arrow"))
    assert all((made / name).read_bytes() == (again / name).read_bytes() for name in shards)


def test_a_problem_in_a_task_reaches_the_user_as_it_is(ingested, tmp_path, monkeypatch):
    from pipeline.cluster.connect import root_cause

    monkeypatch.setattr(writer, "SHARD_ROWS", 2048)
    cells = CacheInput(ingested.all_blocks(), ingested.cells["library_size"].to_numpy(np.float32) + 1, {}, 20.0)
    with pytest.raises(Exception, match="do not add up") as raised:
        write_cache(cells, tmp_path)
    assert isinstance(root_cause(raised.value), InputError)


def test_statistics_over_ray_are_those_of_one_process_to_the_bit(ingested, monkeypatch):
    monkeypatch.setattr(statistics, "TILES_PER_READ", 1)
    monkeypatch.setattr(statistics, "READS_PER_TASK", 1)
    store = statistics.SomaStore(ingested.soma_uri)
    ids = ingested.cells["soma_joinid"].to_numpy()
    train = (ingested.cells["split"] == "train").to_numpy()
    lut = np.arange(50, dtype=np.int32)
    over_ray, here = (
        statistics.count_statistics(store, ids, train, lut, 50, min_cells=3000, parallel=p) for p in (True, False)
    )
    assert 0 < over_ray[1].sum() < 50
    np.testing.assert_array_equal(over_ray[1], here[1])
    for f in fields(here[0]):
        np.testing.assert_array_equal(getattr(over_ray[0], f.name), getattr(here[0], f.name))
