"""A commit that is interrupted at any point never lists a shard that is not complete."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.core import faults
from pipeline.core.faults import FaultError
from pipeline.core.files import replaces
from pipeline.core.shards import CommitPoints, ShardStore

POINTS = CommitPoints("encode.before_rename", "encode.before_record", "encode.after_record")


@pytest.fixture
def store(tmp_path) -> ShardStore:
    return ShardStore(tmp_path, POINTS)


@pytest.fixture(autouse=True)
def no_faults():
    yield
    faults.arm("")


def write(content: bytes):
    def to(path: Path) -> dict[str, int]:
        path.write_bytes(content)
        return {"n_cells": len(content)}

    return to


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_a_commit_leaves_the_shard_and_its_record(store):
    record = store.commit("a.arrow", write(b"abc"))
    assert record["n_cells"] == 3
    assert record["file"] == "a.arrow"
    assert store.path(record).read_bytes() == b"abc"
    assert store.committed() == [record]
    assert visible(store.folder) == ["a.arrow", "a.arrow.json"]


def test_a_record_may_name_its_file_from_the_parent_folder(tmp_path):
    (tmp_path / "cells").mkdir()
    store = ShardStore(tmp_path / "cells", POINTS, prefix="cells/")
    record = store.commit("part-00000.h5ad", write(b"abc"))
    assert (tmp_path / record["file"]).read_bytes() == b"abc"
    assert store.committed() == [record]


def test_a_shard_may_be_named_by_its_content(store):
    record = store.commit("000001-{digest}.arrow", write(b"abc"), record_name="000001.json")
    assert record["file"] == f"000001-{record['sha256'][:12]}.arrow"
    assert store.record("000001.json") == record


@pytest.mark.parametrize(
    ("point", "listed"),
    [
        ("encode.before_rename", False),
        ("encode.before_record", False),
        ("record.before_rename", False),
        ("encode.after_record", True),
    ],
)
def test_an_interrupted_commit_lists_nothing_that_is_not_complete(store, point, listed):
    faults.arm(f"{point}:raise")
    with pytest.raises(FaultError):
        store.commit("a.arrow", write(b"abc"))
    faults.arm("")
    assert [r["file"] for r in store.committed()] == (["a.arrow"] if listed else [])
    store.remove_abandoned()
    again = store.commit("a.arrow", write(b"abc"))
    assert store.committed() == [again]
    assert visible(store.folder) == ["a.arrow", "a.arrow.json"]
    assert len(list(store.folder.iterdir())) == 2


@pytest.mark.parametrize("point", ["encode.before_rename", "encode.before_record", "record.before_rename"])
def test_a_killed_process_leaves_no_shard_that_is_listed(store, point):
    child = os.fork()
    if child == 0:  # pragma: no cover: a process that dies
        faults.arm(f"{point}:kill")
        store.commit("a.arrow", write(b"abc"))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert store.committed() == []
    store.remove_abandoned()
    assert not list(store.folder.glob(".*"))


def test_a_write_that_fails_leaves_nothing(store):
    def fails(path: Path) -> dict[str, int]:
        path.write_bytes(b"ab")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.commit("a.arrow", fails)
    assert not list(store.folder.iterdir())


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "no record", "record is no JSON", "record is a list"])
def test_a_damaged_shard_is_not_listed(store, damage):
    store.commit("a.arrow", write(b"abc"))
    other = store.commit("b.arrow", write(b"def"))
    shard, record = store.folder / "a.arrow", store.folder / "a.arrow.json"
    match damage:
        case "changed":
            shard.write_bytes(b"abd")
        case "cut":
            shard.write_bytes(b"ab")
        case "gone":
            shard.unlink()
        case "no record":
            record.unlink()
        case "record is no JSON":
            record.write_text('{"file": "a.')
        case _:
            record.write_text("[1]")
    assert store.committed() == [other]


def test_the_size_of_a_shard_is_checked_without_reading_it(store):
    def sized(path: Path) -> dict[str, int]:
        path.write_bytes(b"abc")
        return {"bytes": 3}

    record = store.commit("a.arrow", sized)
    assert store.has_size(record)
    store.path(record).write_bytes(b"abd")
    assert store.has_size(record)
    assert not store.is_intact(record)
    store.path(record).write_bytes(b"ab")
    assert not store.has_size(record)


def test_temporary_files_of_running_jobs_are_spared(store):
    old, new = store.folder / ".a.tmp", store.folder / ".b.tmp"
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (time.time() - 7200,) * 2)
    store.remove_abandoned(older_than=3600)
    assert [p.name for p in store.folder.iterdir()] == [".b.tmp"]
    store.remove_abandoned()
    assert not list(store.folder.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "index"
    path.write_text("old")
    with pytest.raises(KeyError), replaces(path) as tmp:  # noqa: PT012
        tmp.write_text("ne")
        raise KeyError
    assert path.read_text() == "old"
    with replaces(path) as tmp:
        tmp.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
