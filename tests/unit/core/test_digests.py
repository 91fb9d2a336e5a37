"""The digest of a large file is computed once for each content, and never trusted for another."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.core import digests
from pipeline.core.digests import content_digest
from scldm.errors import InputError


@pytest.fixture
def reads(monkeypatch):
    """Paths that were read, with any file large enough for a record, however young it is."""
    found = []

    def read(path):
        found.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(digests, "file_digest", read)
    monkeypatch.setattr(digests, "SMALL", 0)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cells.h5ad"
    path.write_bytes(b"counts")
    return path


def test_a_file_is_read_once(reads, file, tmp_path):
    assert {content_digest(file, records=tmp_path / "r") for _ in range(3)} == {hashlib.sha256(b"counts").hexdigest()}
    assert len(reads) == 1


def test_a_rewrite_of_the_same_size_is_seen_even_if_its_time_is_put_back(reads, file, tmp_path):
    before, times = content_digest(file, records=tmp_path / "r"), file.stat()
    with file.open("r+b") as f:
        f.write(b"COUNTS")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_digest(file, records=tmp_path / "r") != before


def test_a_file_that_has_just_changed_leaves_no_record(reads, file, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 60.0)
    content_digest(file, records=tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"sha256": "abc"}'])
def test_a_damaged_record_means_that_the_file_is_read_again(reads, file, tmp_path, damage):
    before = content_digest(file, records=tmp_path / "r")
    (record,) = (tmp_path / "r").iterdir()
    record.write_text(damage)
    assert content_digest(file, records=tmp_path / "r") == before
    assert len(reads) == 2


def test_records_that_cannot_be_written_cost_only_time(reads, file, tmp_path):
    (tmp_path / "r").write_text("a file where the folder should be")
    assert content_digest(file, records=tmp_path / "r") == hashlib.sha256(b"counts").hexdigest()


def test_many_may_write_the_same_record_at_once(reads, file, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: content_digest(file, records=tmp_path / "r"), range(40)))
    assert set(found) == {hashlib.sha256(b"counts").hexdigest()}
    assert len(list((tmp_path / "r").glob("*.json"))) == 1


def test_a_file_that_is_still_being_written_is_refused(file, tmp_path, monkeypatch):
    def read(path):
        path.write_bytes(b"more counts")
        return "0" * 64

    monkeypatch.setattr(digests, "file_digest", read)
    monkeypatch.setattr(digests, "SMALL", 0)
    with pytest.raises(InputError, match="changed while it was read"):
        content_digest(file, records=tmp_path / "r")
