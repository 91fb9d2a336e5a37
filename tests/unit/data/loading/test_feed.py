"""The feed: the right counts, in the order's batches, from any step, on any number of workers."""

import doctest
import pickle
import threading
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
import torch

from pipeline.data.loading.blocks import IpcBlocks, SomaBlocks, SomaReader
from pipeline.data.loading.feed import feed, to_cell_batch, to_latent_batch
from pipeline.data.loading.order import FeedOrder
from pipeline.data.soma.write import write_experiment
from scldm.errors import InputError

N, G, TILE = 300, 30, 16


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(0)
    return sp.random(N, G, 0.3, format="csr", random_state=0, data_rvs=lambda n: rng.integers(1, 9, n)).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory, counts):
    obs = pd.DataFrame({"is_primary_data": [True] * N})
    var = pd.DataFrame({"feature_id": [f"g{i}" for i in range(G)], "feature_name": "x", "feature_length": 0})
    store = write_experiment(tmp_path_factory.mktemp("feed") / "soma", obs, var, [counts], tile=TILE)
    lut = np.arange(G, dtype=np.int32)
    lut[4:] -= 1
    lut[3] = -1  # gene 3 is outside the vocabulary
    ids = np.flatnonzero(np.arange(N) % 7)
    reader = SomaReader(store.uri, {}, "RNA", "raw", lut, ("cell_type",), "uint16")
    return SomaBlocks(ids, {"cell_type": (ids % 5).astype(np.int32)}, TILE, reader)


def order_of(source, **kwargs):
    settings = {"tile": source.tile, "seed": 1, "batch_size": 24, "lanes": 4, "block_rows": 30, **kwargs}
    return FeedOrder(source.ids, **settings)


def steps(source, order, rank=0, world_size=1, start=0, stop=25, micro=24):
    return list(
        feed(
            source, order, rank=rank, world_size=world_size, start_step=start, stop_step=stop, micro_batch_size=micro,
            engine="local",
        )
    )  # fmt: skip


def test_the_example_of_the_loader_runs():
    from pipeline.data.loading import feed as module

    assert doctest.testmod(module).attempted > 10
    assert doctest.testmod(module).failed == 0


def test_a_batch_holds_the_counts_of_its_cells(source, counts):
    kept = [g for g in range(G) if g != 3]
    for step in steps(source, order_of(source), stop=13):
        batch = to_cell_batch(step.micro[0], ["cell_type"])
        expected = counts[batch.joinids.numpy()][:, kept].toarray()
        np.testing.assert_array_equal(batch.dense(G - 1).numpy(), expected)
        np.testing.assert_array_equal(batch.library_size.numpy(), expected.sum(1))
        np.testing.assert_array_equal(batch.conditions["cell_type"].numpy(), batch.joinids.numpy() % 5)
        assert batch.weight.sum() == step.real_cells


def test_an_epoch_holds_every_cell_once(source):
    order = order_of(source)
    found = steps(source, order, stop=order.n_steps_per_epoch)
    ids = np.concatenate([t["soma_joinid"].to_numpy()[t["weight"].to_numpy() == 1] for s in found for t in s.micro])
    np.testing.assert_array_equal(np.sort(ids), source.ids)


def test_a_start_in_the_middle_continues_the_same_tables(source):
    order = order_of(source)
    whole, rest = steps(source, order), steps(source, order, start=9)
    assert [s.step for s in rest] == list(range(9, 25))
    assert all(a.micro[0].equals(b.micro[0]) and a.epoch == b.epoch for a, b in zip(whole[9:], rest, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_share_each_global_batch(source, world_size):
    order = order_of(source)
    alone = steps(source, order)
    together = [steps(source, order, rank=r, world_size=world_size) for r in range(world_size)]
    for k, step in enumerate(alone):
        ids = sorted(i for worker in together for t in worker[k].micro for i in t["soma_joinid"].to_pylist())
        assert ids == sorted(step.micro[0]["soma_joinid"].to_pylist())
        assert {worker[k].real_cells for worker in together} == {step.real_cells}


@pytest.mark.row("T11")
def test_micro_batches_are_small_enough_and_as_many_everywhere(source):
    for step in steps(source, order_of(source), micro=10):
        assert [len(t) for t in step.micro] == [8, 8, 8]


def test_stopping_early_ends_the_reading_thread(source):
    settings = {"rank": 0, "world_size": 1, "start_step": 0, "stop_step": 10_000, "micro_batch_size": 24}
    running = feed(source, order_of(source), **settings, engine="local")
    next(running)
    reading = [t for t in threading.enumerate() if t.name.startswith("feed")]
    assert reading
    running.close()
    assert not [t for t in reading if t.is_alive()]


def test_sources_are_plain_data(source):
    source.read(source.ids[:4])
    again = pickle.loads(pickle.dumps(source))
    assert again.read(source.ids[:4]).equals(source.read(source.ids[:4]))


def test_the_gene_cap_samples_by_cell_and_keeps_the_library_size(source):
    table = source.read(source.ids[:50])
    whole = to_cell_batch(table, [])
    capped = to_cell_batch(table, [], max_genes=5, seed=1)
    later = to_cell_batch(table.slice(20), [], max_genes=5, seed=1)
    assert capped.lengths.max() == 5
    torch.testing.assert_close(capped.library_size, whole.library_size)
    torch.testing.assert_close(capped.dense(G)[20:], later.dense(G))
    values = capped.dense(G)
    assert ((values == whole.dense(G)) | (values == 0)).all()


def write_latents(folder, dtype=np.float32):
    """Two shards in record batches of 8 rows; the source, and the latents of all rows."""
    m, e = 2, 3
    values = np.arange(50 * m * e).astype(dtype).reshape(50, m * e)
    table = pa.table(
        {
            "soma_joinid": np.arange(50) * 10,
            "label:cell_type": (np.arange(50) % 4).astype(np.int32),
            "log_library_size": np.arange(50, dtype=np.float32),
            "latent": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), m * e),
        }
    )
    files = (("a.arrow", 30), ("b.arrow", 20))
    for (name, rows), start in zip(files, (0, 30), strict=True):
        with pa.ipc.new_file(folder / name, table.schema) as writer:
            writer.write_table(table.slice(start, rows), max_chunksize=8)
    return pickle.loads(pickle.dumps(IpcBlocks(str(folder), files, tile=8))), values


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_latents_are_read_by_position_from_shards_and_computed_with_in_float32(tmp_path, dtype):
    m, e = 2, 3
    source, values = write_latents(tmp_path, dtype)
    ids = np.array([49, 0, 31, 31, 29, 8])
    batch = to_latent_batch(source.read(ids), ["cell_type"], shape=(m, e))
    np.testing.assert_array_equal(batch.latents.numpy(), values[ids].reshape(-1, m, e))
    assert batch.latents.dtype == torch.float32
    np.testing.assert_array_equal(batch.joinids.numpy(), ids * 10)
    np.testing.assert_array_equal(batch.conditions["cell_type"].numpy(), ids % 4)
    found = steps(source, order_of(source, batch_size=8, block_rows=8), stop=7)
    assert sum(s.real_cells for s in found) == 50
    for step in found:
        for table in step.micro:
            latents = to_latent_batch(table, ["cell_type"], shape=(m, e)).latents
            np.testing.assert_array_equal(latents.flatten(1).numpy(), values[table["soma_joinid"].to_numpy() // 10])


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_latent_shard_that_is_missing_or_damaged_is_named_with_a_remedy(tmp_path, damage):
    source, _ = write_latents(tmp_path)
    shard = tmp_path / "b.arrow"
    content = shard.read_bytes()
    shard.unlink()
    if damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"latent shard .*b\.arrow is missing or damaged .* run it again"):
        source.read(np.array([40]))


class Recording:
    """A source that notes what is read; stands in for `source`."""

    def __init__(self, source):
        self.inner, self.blocks = source, []
        self.ids, self.tile, self.reader, self.rows = source.ids, source.tile, source.reader, source.rows

    def read(self, ids):
        self.blocks.append(ids)
        return self.inner.read(ids)


def settled(recording):
    """Number of reads once the reading thread rests."""
    seen = -1
    while seen != len(recording.blocks):
        seen = len(recording.blocks)
        time.sleep(0.1)
    return seen


def test_a_start_in_the_middle_reads_only_what_is_left(source):
    order, start = order_of(source), 9
    at, recording = order.locate(start), Recording(source)
    assert at.batch > 0, "the start must be inside a block"
    rest = steps(recording, order, start=start, stop=order.n_steps_per_epoch)
    used = np.concatenate([t["soma_joinid"].to_numpy() for s in rest for t in s.micro])
    read = np.concatenate(recording.blocks)
    np.testing.assert_array_equal(np.sort(read), np.sort(used))  # not one row of the steps before
    assert len(recording.blocks) == order.lanes * (order.n_rounds - at.round)  # each block once
    left = (order.steps_in_round(at.round) - at.batch) * order.rows_per_lane
    assert [len(b) for b in recording.blocks[: order.lanes]] == [left] * order.lanes  # the current block, cut


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_round_is_read_while_the_round_before_is_consumed_and_no_more(source, world_size):
    order, recording = order_of(source), Recording(source)
    lanes = order.lanes // world_size
    settings = {"rank": 0, "world_size": world_size, "micro_batch_size": 24, "engine": "local"}
    running = feed(recording, order, start_step=0, stop_step=10_000, **settings)
    for step in running:
        round_ = step.epoch * order.n_rounds + order.locate(step.step).round
        assert settled(recording) == (round_ + 2) * lanes, "the next round is in memory before it is asked for"
        if round_ == 3:
            break
    running.close()


def test_waiting_for_data_is_hidden_behind_the_work_on_a_step(source):
    """Reading a round takes 4 x 20 ms, working on its 5 steps 5 x 40 ms: only the first round is waited for."""

    class Slow(Recording):
        def read(self, ids):
            time.sleep(0.02)
            return super().read(ids)

    order, waits = order_of(source, batch_size=24, block_rows=30), []
    running = feed(
        Slow(source), order, rank=0, world_size=1, start_step=0, stop_step=26, micro_batch_size=24, engine="local"
    )
    for _ in range(26):
        began = time.perf_counter()
        next(running)
        waits.append(time.perf_counter() - began)
        time.sleep(0.04)
    rounds = [wait for step, wait in enumerate(waits) if order.locate(step).batch == 0]
    print(f"\nwait at the start of a round, ms: {np.round(np.array(rounds) * 1e3, 1)}")
    assert rounds[0] > 0.08
    assert np.median(rounds[1:]) < 0.02  # a median: others use this machine too


def test_the_last_batch_of_an_epoch_is_filled_with_repeats_of_weight_0(source):
    order = order_of(source)
    for world_size in (1, 2, 4):
        workers = [
            steps(source, order, rank=r, world_size=world_size, stop=order.n_steps_per_epoch) for r in range(world_size)
        ]
        assert {len(w) for w in workers} == {order.n_steps_per_epoch}  # known before the epoch, equal on all
        last = [t for w in workers for t in w[-1].micro]
        assert sum(len(t) for t in last) == order.batch_size
        real = sum(float(t["weight"].to_numpy().sum()) for t in last)
        assert real == order.real_cells(order.n_steps_per_epoch - 1) == len(source.ids) % order.batch_size


@pytest.mark.parametrize("n_cells", [50, 1000])
def test_validation_cells_are_scored_once_on_any_number_of_workers(source, n_cells):
    from pipeline.training.objectives.vae import validation_tables

    tables = validation_tables(source, n_cells=n_cells, batch_size=16, seed=4)
    ids = np.concatenate([t["soma_joinid"].to_numpy() for t in tables])
    assert len(ids) == len(np.unique(ids)) == min(n_cells, len(source.ids))
    assert set(ids) <= set(source.ids)
    for world_size in (2, 3):
        shares = [t["soma_joinid"].to_numpy() for r in range(world_size) for t in tables[r::world_size]]
        np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.sort(ids))
