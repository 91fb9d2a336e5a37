"""The cache: the rows of SOMA byte for byte, made once, shared, and mended when something of it is lost."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig
from pipeline.core.manifest import MANIFEST, Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.loading import cache_writer as writer
from pipeline.data.loading.arrow_shards import close_all, record_path
from pipeline.data.loading.cache import CacheBlocks
from pipeline.data.loading.feed import feed
from pipeline.data.loading.order import FeedOrder
from pipeline.stages import ingest
from scldm.errors import InputError

SYNTHETIC = {"type": "synthetic", "n_cells": 5000, "n_genes": 60, "n_types": 3}


def run(folder: Path, **config):
    folder.mkdir(parents=True, exist_ok=True)
    context = StageContext(folder, {}, 0, SimpleNamespace(), None, output=folder.parent)
    facts = ingest.run(IngestConfig.model_validate({"source": SYNTHETIC, **config}), context)
    return facts, opened(folder, facts)


def opened(folder: Path, facts: dict) -> IngestedDataset:
    return IngestedDataset.open(Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0))


def shards_of(data: IngestedDataset) -> list[Path]:
    return sorted((data.folder / data.facts["cache"]["folder"]).resolve().glob("*.arrow"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(writer, "SHARD_ROWS", 2048)
    monkeypatch.setattr(writer, "cluster_is_up", lambda: False)  # another test of the session may have started one


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_ROWS", 2048)
        return run(tmp_path_factory.mktemp("cache") / "ingest", cache=True)


def test_batches_of_two_epochs_are_those_of_soma_byte_for_byte(made):
    _, data = made
    soma, cache = data.streamed("train"), data.blocks("train")
    assert isinstance(cache, CacheBlocks)
    assert cache.reader.schema == soma.reader.schema
    np.testing.assert_array_equal(cache.ids, soma.ids)
    order = FeedOrder(cache.ids, cache.tile, seed=3, batch_size=96, lanes=4, block_rows=512)
    assert order.n_cells % 96  # the last batch is filled with repeats
    stop = 2 * order.n_steps_per_epoch + 2
    settings = {"rank": 0, "world_size": 1, "start_step": 0, "stop_step": stop, "micro_batch_size": 40}
    n = 0
    for a, b in zip(
        feed(soma, order, **settings, engine="local"), feed(cache, order, **settings, engine="local"), strict=True
    ):
        assert (a.step, a.epoch, a.real_cells) == (b.step, b.epoch, b.real_cells)
        assert all(as_bytes(x) == as_bytes(y) for x, y in zip(a.micro, b.micro, strict=True))
        n += 1
    assert n == stop


def as_bytes(table) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    return sink.getvalue().to_pybytes()


def test_any_rows_in_any_order_with_repeats(made):
    _, data = made
    for split in ("validation", "test"):
        soma, cache = data.streamed(split), data.blocks(split)
        ids = np.random.default_rng(0).choice(cache.ids, 300)
        assert as_bytes(cache.read(ids)) == as_bytes(soma.read(ids))
    assert len(cache.read(ids[:0])) == 0
    with pytest.raises(ValueError, match="not among the cells"):
        cache.read(np.array([10**9]))


def test_a_cache_is_plain_data(made):
    _, data = made
    cache = data.blocks("test")
    again = pickle.loads(pickle.dumps(cache))
    assert again.read(cache.ids[:4]).equals(cache.read(cache.ids[:4]))


def test_shards_end_at_storage_tiles_and_hold_every_cell_once():
    ids = np.flatnonzero(np.random.default_rng(0).random(20_000) < 0.3)
    ends = writer.shard_ends(ids, 64)
    assert ends[-1] == len(ids)
    assert (np.diff(ends) > 0).all()
    assert all(ids[e - 1] // 64 != ids[e] // 64 for e in ends[:-1])
    assert np.diff(np.r_[0, ends]).max() < 2048 + 64


def test_jobs_with_other_labels_or_another_split_share_a_cache(made, tmp_path):
    facts, data = made
    root = shards_of(data)[0].parents[1]
    again, other = run(tmp_path / "b", cache=str(root), labels=["tissue_general"], split={"salt": "pepper"})
    assert Path(again["cache"]["folder"]) == shards_of(data)[0].parent
    assert again["cache"]["kept"] == facts["cache"]["shards"] == 3
    ids = other.blocks("train").ids
    assert other.blocks("train").read(ids[::7]).equals(other.all_blocks().read(ids[::7]))


def test_other_counts_genes_or_cells_get_another_cache(made, tmp_path):
    facts, _ = made
    folders = {Path(facts["cache"]["folder"]).name}
    for i, config in enumerate(
        [
            {"source": {**SYNTHETIC, "seed": 1}},
            {"genes": {"min_cells": 200}},
            {"obs_filter": "tissue_general == 'blood'"},
        ]
    ):
        folders.add(Path(run(tmp_path / str(i), cache=str(tmp_path / "cache"), **config)[0]["cache"]["folder"]).name)
    assert len(folders) == 4


def test_the_output_folder_can_be_moved(tmp_path):
    facts, data = run(tmp_path / "a" / "ingest", cache=True)
    expected = data.blocks("test").read(data.blocks("test").ids)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = opened(tmp_path / "b" / "ingest", facts).blocks("test")
    assert moved.read(moved.ids).equals(expected)


# ---- what can go wrong -------------------------------------------------------------------------------------------
def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    real, calls = writer.write_shard_file, []

    def killed_at_the_third(path, table):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half a shard")
            raise KeyboardInterrupt
        return real(path, table)

    monkeypatch.setattr(writer, "write_shard_file", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", cache=str(tmp_path / "cache"))
    folder = next((tmp_path / "cache").iterdir())
    assert not (folder / MANIFEST).exists()
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.arrow")}
    assert len(before) == 2
    facts, data = run(tmp_path / "a", cache=str(tmp_path / "cache"))
    assert len(calls) == 4  # only the third was made
    assert facts["cache"]["kept"] == 2
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in folder.glob("*.arrow")}.items()
    ids = data.blocks("train").ids
    assert data.blocks("train").read(ids).equals(data.all_blocks().read(ids))


def test_a_damaged_shard_is_refused_when_read_and_mended_by_ingest(tmp_path):
    _, data = run(tmp_path / "a", cache=str(tmp_path / "cache"))
    shard = shards_of(data)[1]
    whole = shard.read_bytes()
    shard.unlink()  # a new file: the old one may still be open in this process
    shard.write_bytes(whole[:20_000] + bytes([whole[20_000] ^ 1]) + whole[20_001:])
    fresh_process()
    source = data.blocks("train")
    with pytest.raises(InputError, match=r"cache shard .* is missing or damaged .record batch \d+ does not have its"):
        source.read(source.ids)
    facts, data = run(tmp_path / "a", cache=str(tmp_path / "cache"))
    assert facts["cache"]["kept"] == facts["cache"]["shards"] - 1
    assert shard.read_bytes() == whole
    fresh_process()
    assert data.blocks("train").read(source.ids).equals(data.all_blocks().read(source.ids))


def fresh_process():
    close_all()


@pytest.mark.parametrize("what", ["shard", "record", "end of a shard", "manifest"])
def test_what_is_lost_is_named_with_a_remedy(tmp_path, what):
    _, data = run(tmp_path / "a", cache=str(tmp_path / "cache"))
    shard = shards_of(data)[0]
    if what == "end of a shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        {"shard": shard, "record": record_path(shard), "manifest": shard.with_name(MANIFEST)}[what].unlink()
    fresh_process()
    with pytest.raises(InputError, match=r"delete manifest\.json of the ingest that names this cache and run its job"):
        data.blocks("train").read(data.blocks("train").ids)
    facts, data = run(tmp_path / "a", cache=str(tmp_path / "cache"))
    assert facts["cache"]["kept"] == facts["cache"]["shards"] - (what != "manifest")
    fresh_process()
    assert len(data.blocks("train").read(data.blocks("train").ids)) == facts["n_cells"]["train"]


def test_a_small_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"ingest\.cache: 5,000 cells take about .* GB free, .* name a folder on a"):
        run(tmp_path / "a", cache=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_counts_that_changed_since_they_were_taken_are_refused(made, tmp_path):
    _, data = made
    cells = writer.CacheInput(data.all_blocks(), data.cells["library_size"].to_numpy(np.float32) + 1, {}, 20.0)
    with pytest.raises(
        InputError, match=r"do not add up to the library size that ingest recorded .cell 0: \d+, not \d+"
    ):
        writer.write_cache(cells, tmp_path)


def test_the_manifest_says_what_the_cache_is(made):
    facts, data = made
    manifest = json.loads(shards_of(data)[0].with_name(MANIFEST).read_text())
    assert manifest["n_cells"] == sum(facts["n_cells"].values())
    assert [s["file"] for s in manifest["shards"]] == [p.name for p in shards_of(data)]
    assert manifest["bytes"] == sum(p.stat().st_size for p in shards_of(data))
