"""Ranks are killed, stopped, or run out of disk at exact points; the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.training.ranks import KILLED, REFUSED, STOPPED, cells_by_step, mad_clocks, run, start, times_begun, train
from helpers.training.small_job import EVERY, STEPS, ingest_small, spec_of
from safetensors.torch import load_file

from pipeline.core.manifest import Manifest
from pipeline.training.checkpoints.manifest import newest, read

pytestmark = pytest.mark.multiprocess
# They shift what goes into a softmax, which does not see it: their gradient is rounding, and Adam makes that large.
SHIFTS = ("decoder.head.bias", "encoder.counts.mlp.2.bias")


@pytest.fixture(scope="session")
def ingested(tmp_path_factory) -> Manifest:
    return ingest_small(tmp_path_factory.mktemp("ingest"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory, ingested) -> Path:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train(spec_of(folder, ingested))
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    """Weights bit for bit, optimizer and random state too, and every step made of the same cells."""
    last, expected = (newest(p / "checkpoints")[0] for p in (folder, whole))
    assert last.position.step == expected.position.step == STEPS
    pairs = [(folder / "model" / "model.safetensors", whole / "model" / "model.safetensors")]
    pairs += [(last.folder / p.name, p) for p in expected.folder.glob("*.safetensors")]
    for path, other in pairs:
        one, two = load_file(path), load_file(other)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=0, msg=f"{path.name}: {name}")
    assert cells_by_step(folder) == cells_by_step(whole)


def doubled_and_missing(folder: Path, ingested: Manifest) -> dict[str, int]:
    """Cells of the whole epochs of a run, by the attempt that did a step last; for a record."""
    steps, n_cells = cells_by_step(folder), ingested.facts["n_cells"]["train"]
    per_epoch, doubled, missing = -(-n_cells // 32), 0, 0
    assert len(steps) >= per_epoch
    for epoch in range(len(steps) // per_epoch):
        seen = Counter(c for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for c in steps[step])
        doubled += sum(n - 1 for n in seen.values())
        missing += n_cells - len(seen)
    assert (doubled, missing) == (0, 0)
    return {"duplicates": doubled, "missing": missing}


def lost_steps(folder: Path) -> int:
    return sum(n - 1 for n in times_begun(folder).values())


@pytest.mark.row("T11")
def test_the_uninterrupted_run_sees_every_cell_once_an_epoch(whole, ingested):
    assert doubled_and_missing(whole, ingested) == {"duplicates": 0, "missing": 0}


@pytest.mark.row("T1", "T2", "C1")
@pytest.mark.parametrize(
    "faults",
    [
        ["training.before_step:step=6:rank=0:kill", "training.before_update:step=9:rank=1:kill"],
        [  # n counts from where a killed run resumes
            "checkpoint.in_shard:rank=1:n=3:kill",
            "checkpoint.before_manifest:rank=0:n=1:kill",
            "checkpoint.after_manifest:rank=0:n=1:kill",
        ],
    ],
    ids=["in steps", "in checkpoints"],
)
def test_killed_ranks_change_nothing_and_cost_at_most_an_interval_each(tmp_path, whole, ingested, faults, record):
    spec = spec_of(tmp_path, ingested)
    for fault in faults:
        codes = run(spec, fault=fault)
        rank = int(re.search(r"rank=(\d)", fault)[1])
        assert codes[rank] == KILLED, f"{fault} did not happen: {codes}"
    train(spec)
    assert_same(tmp_path, whole)
    assert 0 < lost_steps(tmp_path) <= EVERY * len(faults)
    record |= {"kills": len(faults), "lost_steps": lost_steps(tmp_path) / len(faults)}
    record |= doubled_and_missing(tmp_path, ingested)


@pytest.mark.row("T5", "T6")
def test_a_stop_signal_costs_no_step(tmp_path, whole, ingested, record):
    """SIGTERM to one rank: all write a checkpoint at the end of that step and end."""
    spec = spec_of(tmp_path, ingested)
    assert run(spec, fault="training.before_step:step=6:rank=1:term") == [STOPPED, STOPPED]
    assert newest(tmp_path / "checkpoints")[0].position.step == 7
    train(spec)
    assert_same(tmp_path, whole)
    assert lost_steps(tmp_path) == 0
    record |= {"lost_steps": 0, **doubled_and_missing(tmp_path, ingested)}


@pytest.mark.row("T6")
def test_a_stop_file_is_a_stop_signal(tmp_path, ingested):
    """The driver writes it when it is asked to stop. It is removed at the next start."""
    spec = spec_of(tmp_path, ingested, max_steps=100_000, checkpoint_every=100_000, validate_every=100_000)
    import threading

    def ask() -> None:
        while not times_begun(tmp_path):
            threading.Event().wait(0.05)
        (tmp_path / "stop.request").write_text("go")

    threading.Thread(target=ask, daemon=True).start()
    assert run(spec) == [STOPPED, STOPPED]
    assert newest(tmp_path / "checkpoints")[0].position.step == max(times_begun(tmp_path)) + 1


@pytest.mark.row("C2")
def test_C2_a_damaged_checkpoint_costs_an_interval_or_under_strict_resume_ends_all_workers(tmp_path, whole, ingested):
    spec = spec_of(tmp_path, ingested)
    assert run(spec, fault="training.before_step:step=9:rank=1:kill")[1] == KILLED
    damaged = newest(tmp_path / "checkpoints")[0].folder
    shard = next(damaged.glob("state-00001*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    began = time.monotonic()
    assert run(spec_of(tmp_path, ingested, {"strict_resume": True})) == [REFUSED, REFUSED], (
        "no worker waits for one that has ended"
    )
    assert time.monotonic() - began < 60
    log = (tmp_path / "log").read_text()
    assert f"{damaged}: {shard.name} has " in log
    assert "checkpoints.strict_resume=false" in log
    assert damaged.is_dir(), "nothing is removed"
    train(spec)
    assert_same(tmp_path, whole)
    assert lost_steps(tmp_path) == 9 - 4 + 1, "from step 4 on, and the step of the kill"


# ---- another place, another number of workers --------------------------------------------------------------------
@pytest.mark.row("C1", "T7")
def test_a_run_whose_machine_is_gone_resumes_from_remote_storage(tmp_path, whole, ingested):
    """Killed in the middle of an upload; then the local folder is lost."""
    storage = {"storage_path": str(tmp_path / "nfs")}
    spec = spec_of(tmp_path / "a", ingested, storage)
    # 2 shards, 2 random states and a manifest of the first checkpoint; then the second file of the next
    codes = run(spec, fault="upload.before_file:rank=0:n=7:kill")
    assert codes[0] == KILLED
    there = tmp_path / "nfs" / "job" / "train_vae" / "v"
    committed = [p.parent.name for p in there.glob("step-*/MANIFEST.json")]
    assert [name.split("-")[1] for name in committed] == ["00000004"]
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    spec["folder"] = str(tmp_path / "a")
    train(spec)
    assert_same(tmp_path / "a", whole)
    assert newest(there)[0].position.step == STEPS
    assert len(list(there.glob("step-*"))) <= 3, "old checkpoints stay in remote storage"


@pytest.mark.row("C8")
def test_another_number_of_workers_sees_the_same_cells_in_the_same_order(tmp_path, whole, ingested):
    """Two, then one, then two. The weights of each ZeRO stage: test_elastic."""
    spec = spec_of(tmp_path, ingested)
    assert run(spec, 2, "training.before_step:step=5:rank=1:kill")[1] == KILLED
    assert run(spec, 1, "training.before_step:step=8:rank=0:term") == [STOPPED]
    found = newest(tmp_path / "checkpoints")[0]
    assert (found.position.step, found.position.world_size) == (9, 1)
    train(spec, 2)
    assert cells_by_step(tmp_path) == cells_by_step(whole)
    one, two = (load_file(p / "model" / "model.safetensors") for p in (tmp_path, whole))
    worst = {name: float((one[name] - two[name]).abs().max()) for name in one}
    rounding = [worst.pop(name) for name in SHIFTS]
    assert max(worst.values()) < 1e-5, worst  # a hundredth of one step of Adam, which makes rounding larger
    assert max(rounding) < STEPS * 1e-3  # a learning rate a step


# ---- clocks ------------------------------------------------------------------------------------------------------
@pytest.mark.row("T14")
def test_T14_workers_whose_clocks_are_days_apart_and_jump_resume_from_the_same_step(tmp_path, whole, ingested, record):
    spec = spec_of(tmp_path, ingested)
    fault = "training.before_step:step=6:rank=1:kill"
    assert start(tmp_path, mad_clocks, 2, fault, spec=spec)[1] == KILLED
    assert newest(tmp_path / "checkpoints")[0].position.step == 4
    assert start(tmp_path, mad_clocks, 2, spec=spec) == [0, 0], (tmp_path / "log").read_text()[-3000:]
    assert_same(tmp_path, whole)
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) <= 3, "a folder of a clock's own"
    record |= {"lost_steps": lost_steps(tmp_path), **doubled_and_missing(tmp_path, ingested)}


# ---- the disk ----------------------------------------------------------------------------------------------------
@pytest.mark.row("C5")
def test_on_a_full_disk_training_goes_on_and_the_old_checkpoint_stays(small_disk, tmp_path, whole, ingested):
    folder = small_disk / "run"
    spec = spec_of(folder, ingested)
    assert run(spec, fault="training.before_step:step=6:rank=1:kill")[1] == KILLED
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    filler.write_bytes(b"0" * (free.f_bavail * free.f_frsize - (64 << 10)))  # room for a log, not for a checkpoint
    codes = run(spec)
    log = (folder / "log").read_text()
    assert "CHECKPOINT FAILED at step 8" in log
    assert "No space left on device" in log
    assert "the newest one is step-00000004" in log
    assert "Training goes on" in log
    assert 0 not in codes, "the last checkpoint could not be written either, and the run must say so"
    assert "CHECKPOINT FAILED at step 12" in log
    assert newest(folder / "checkpoints")[0].position.step == 4
    filler.unlink()
    train(spec)
    assert_same(folder, whole)
    assert not [p for p in (folder / "checkpoints").glob("step-*") if not (p / "MANIFEST.json").exists()]


def test_the_manifest_describes_the_checkpoint(whole):
    found = read(newest(whole / "checkpoints")[0].folder)
    assert (found.position.step, found.position.epoch, found.position.offset) == (12, 1, 4)
    assert found.position.world_size == 2
    assert "val/loss" in found.metrics
    assert {"guard", "best", "losses", "tracker"} <= set(found.more)
    names = {p.name for p in found.folder.iterdir()}
    assert names >= {"state-00000-of-00002.safetensors", "random-00001.safetensors", "MANIFEST.json"}
    assert not [n for n in names if n.endswith((".pt", ".pkl"))], "no pickle in a checkpoint"
    assert json.loads((found.folder / "MANIFEST.json").read_text())["schema"] == 2
