"""Ingest is killed at every point of its cache's commit: the same command again makes the same shards, and no other."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig
from pipeline.core.fault_points import POINTS
from pipeline.core.faults import VARIABLE
from pipeline.data.loading import cache_writer
from pipeline.stages import ingest

pytestmark = pytest.mark.chaos
SOURCE = {"type": "synthetic", "n_cells": 5000, "n_genes": 60, "n_types": 3}
KILLS = [
    "cache.before_rename:n=1:kill", "cache.before_record:n=2:kill", "cache.after_record:n=2:kill",
    "cache.before_manifest:kill",
]  # fmt: skip


def run(folder: Path, fault: str = "") -> dict[str, Any]:
    os.environ[VARIABLE] = fault
    cache_writer.SHARD_ROWS = 2048
    cache_writer.cluster_is_up = lambda: False
    folder.mkdir(parents=True, exist_ok=True)
    context = StageContext(folder, {}, 0, SimpleNamespace(), None, output=folder.parent)
    return ingest.run(IngestConfig.model_validate({"source": SOURCE, "cache": True}), context)


def shards(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the shards under an ingest's output."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.parent.rglob("*.arrow"))}


def test_every_point_of_the_cache_is_among_the_kills():
    assert {k.split(":")[0] for k in KILLS} == {p for p in POINTS if p.startswith("cache.")}


@pytest.mark.row("C1")
def test_a_cache_that_is_killed_anywhere_is_made_whole_by_the_same_command(tmp_path, monkeypatch, record):
    monkeypatch.setattr(cache_writer, "SHARD_ROWS", 2048)
    monkeypatch.setattr(cache_writer, "cluster_is_up", lambda: False)
    monkeypatch.setenv(VARIABLE, "")
    run(tmp_path / "whole" / "ingest")
    whole = shards(tmp_path / "whole" / "ingest")
    assert len(whole) == 3
    for i, fault in enumerate(KILLS):
        folder = tmp_path / f"kill{i}" / "ingest"
        process = multiprocessing.get_context("spawn").Process(target=run, args=(folder, fault))
        process.start()
        process.join(180)
        assert process.exitcode == -signal.SIGKILL, fault
        done = {p.name: p.stat().st_mtime_ns for p in folder.parent.rglob("*.arrow")}
        assert done.keys() <= whole.keys()
        facts = run(folder)
        assert shards(folder) == whole, fault
        kept = 0 if i == 0 else len(done) - ("before_record" in fault)  # what has no record is made again
        assert facts["cache"]["kept"] == kept, fault
    record |= {"kills": len(KILLS)}
