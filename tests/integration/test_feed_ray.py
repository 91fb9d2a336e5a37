"""Reading with Ray Data gives the tables that reading in this process gives."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.loading.feed import feed
from pipeline.data.loading.order import FeedOrder
from pipeline.stages import ingest

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ingest")
    config = IngestConfig.model_validate({"source": {"type": "synthetic", "n_cells": 600, "n_genes": 50}})
    facts = ingest.run(config, StageContext(folder, {}, 0, SimpleNamespace(), None))
    return IngestedDataset.open(Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0)).blocks("train")


@pytest.mark.parametrize("world_size", [1, 2])
def test_ray_and_local_feeds_are_identical(ray_cluster, source, world_size):
    order = FeedOrder(source.ids, tile=64, seed=5, batch_size=32, lanes=4, block_rows=40)
    stop = 2 * order.n_steps_per_epoch + 3  # over two ends of epochs
    for rank in range(world_size):
        both = [
            feed(
                source,
                order,
                rank=rank,
                world_size=world_size,
                start_step=4,
                stop_step=stop,
                micro_batch_size=16,
                engine=e,
            )
            for e in ("ray", "local")
        ]
        n = 0
        for a, b in zip(*both, strict=True):
            assert (a.step, a.epoch, a.real_cells) == (b.step, b.epoch, b.real_cells)
            assert all(x.equals(y) for x, y in zip(a.micro, b.micro, strict=True))
            n += 1
        assert n == stop - 4


def test_encode_reads_every_cell_once_in_storage_order(ray_cluster, source):
    from pipeline.data.loading.blocks import storage_blocks
    from pipeline.data.loading.ray_source import blocks_dataset

    source = replace(source, tile=64)
    blocks = storage_blocks(source, block_rows=128)
    assert len(blocks) == 5
    tables = list(blocks_dataset(source, blocks).iter_batches(batch_size=None, batch_format="pyarrow"))
    np.testing.assert_array_equal(np.concatenate([t["soma_joinid"].to_numpy() for t in tables]), source.ids)
