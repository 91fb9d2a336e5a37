"""The order contract: exact cover, purity, independence of the number of workers, weights."""

import numpy as np
import pytest

from pipeline.data.loading.order import FeedOrder
from scldm.errors import InputError

TILE = 64


def make_order(n=1000, batch_size=16, lanes=4, block_rows=32, seed=3, gaps=True):
    ids = np.sort(np.random.default_rng(0).choice(3 * n, n, replace=False)) if gaps else np.arange(n)
    return FeedOrder(ids, tile=TILE, seed=seed, batch_size=batch_size, lanes=lanes, block_rows=block_rows)


def global_batch(order, step, world_size=1):
    """Ids and weights of a global batch, put together from the lanes of all workers."""
    at, q = order.locate(step), order.rows_per_lane
    parts = []
    for rank in range(world_size):
        for lane in order.lanes_of(rank, world_size):
            ids, weights = order.block(at.epoch, at.round, lane)
            rows = slice(at.batch * q, (at.batch + 1) * q)
            parts += zip(ids[rows].tolist(), weights[rows].tolist(), strict=True)
    return parts


def epoch_ids(order, epoch):
    n = order.n_steps_per_epoch
    return [i for s in range(epoch * n, (epoch + 1) * n) for i, w in global_batch(order, s) if w == 1]


@pytest.mark.row("T11")
@pytest.mark.parametrize(
    ("n", "batch_size", "lanes", "block_rows"),
    [(1000, 16, 4, 32), (1000, 16, 4, 8192), (960, 16, 4, 24), (5, 16, 4, 32), (1001, 6, 2, 7), (2, 8, 4, 4)],
)
@pytest.mark.row("D:fewer-cells-than-batch")
def test_every_cell_is_seen_exactly_once_per_epoch(n, batch_size, lanes, block_rows):
    order = make_order(n, batch_size, lanes, block_rows)
    for epoch in (0, 1):
        assert sorted(epoch_ids(order, epoch)) == order.ids.tolist()


def test_epochs_differ_and_depend_on_the_seed_only():
    order = make_order()
    assert epoch_ids(order, 0) != epoch_ids(order, 1)
    assert epoch_ids(order, 7) == epoch_ids(make_order(), 7)
    assert epoch_ids(order, 0) != epoch_ids(make_order(seed=4), 0)


def test_global_batches_do_not_depend_on_the_number_of_workers():
    order = make_order()
    for step in (0, 5, order.n_steps_per_epoch - 1, order.n_steps_per_epoch + 2):
        alone = sorted(global_batch(order, step, world_size=1))
        assert (
            alone == sorted(global_batch(order, step, world_size=2)) == sorted(global_batch(order, step, world_size=4))
        )


def test_a_fresh_order_continues_in_the_middle():
    whole = [global_batch(make_order(), s) for s in range(130)]
    resumed = make_order()
    assert [global_batch(resumed, s) for s in range(77, 130)] == whole[77:]


@pytest.mark.parametrize(("n", "block_rows"), [(1000, 32), (1000, 8192), (7, 32), (1024, 64)])
def test_weights_add_up_and_only_the_last_batch_is_filled(n, block_rows):
    order = make_order(n, block_rows=block_rows)
    for step in range(order.n_steps_per_epoch):
        weights = [w for _, w in global_batch(order, step)]
        assert len(weights) == order.batch_size
        assert sum(weights) == order.real_cells(step)
        assert step == order.n_steps_per_epoch - 1 or 0 not in weights


def test_a_batch_mixes_distant_tiles():
    order = make_order(100 * TILE, batch_size=64, lanes=4, block_rows=4 * TILE, gaps=False)
    tiles = {i // TILE for i, _ in global_batch(order, 0)}
    assert len(tiles) >= 12  # of the 16 tiles in a round


def test_block_rows_are_rounded_down_to_whole_batches():
    assert make_order(batch_size=16, lanes=4, block_rows=30).steps_per_round == 7


def test_wrong_sizes_name_the_setting_and_the_remedy():
    with pytest.raises(InputError, match=r"feed.batch_size \(10\) must be a multiple of feed.lanes \(4\)"):
        make_order(batch_size=10, lanes=4)
    with pytest.raises(InputError, match=r"feed.lanes \(4\) must be a multiple of the number of workers \(3\).*to 6"):
        make_order().lanes_of(0, 3)
    with pytest.raises(InputError, match="no cells"):
        FeedOrder(np.empty(0, np.int64), tile=4, seed=0, batch_size=4, lanes=2, block_rows=8)
