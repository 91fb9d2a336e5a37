"""Ray's object store with too little room, and a full disk behind it: reading waits, or says which settings mend it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.servers.raylets import RealCluster

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]
TESTS = Path(__file__).resolve().parents[2]
STORE = 80_000_000  # about Ray's least: nine blocks of 256 cells


@pytest.fixture
def cluster(tmp_path, small_disk) -> Iterator[RealCluster]:
    """One node; what its store cannot hold goes to a file system of 16 MB: two blocks."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    store = (f"--object-store-memory={STORE}", f"--object-spilling-directory={small_disk}")
    started = RealCluster(tmp_path, {"PYTHONPATH": path}, head=store)
    yield started
    started.close()


def read(cluster: RealCluster, spill: Path, *, workers: int, block: int) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        str(TESTS / "helpers" / "servers" / "small_object_store.py"),
        cluster.address,
        str(spill),
        str(workers),
        str(block),
    ]
    return subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=200)


@pytest.mark.row("T12")
def test_T12_an_object_store_with_too_little_room_makes_reading_wait_or_says_what_mends_it(cluster, small_disk, record):
    """One worker reads three times what the store holds, and nothing is written to the disk: reading waits. Two fill
    it; then what is said is done, until it fits."""
    alone = read(cluster, small_disk, workers=1, block=256)
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert json.loads(alone.stdout.splitlines()[-1])["spilled_mb"] == 0
    block, done = 256, read(cluster, small_disk, workers=2, block=256)
    while done.returncode != 0:
        assert "fits neither into Ray's object store nor on the disk behind it" in done.stderr, done.stderr[-3000:]
        told = int(re.findall(r"train.feed.block_rows=(\d+), which", done.stderr)[-1])
        assert told == block // 2
        block, done = told, read(cluster, small_disk, workers=2, block=told)
    assert block < 256, "the store was never full"
    for said in (json.loads(d.stdout.splitlines()[-1]) for d in (alone, done)):
        assert said["longest_wait_s"] < 60
        record |= {k: record.get(k, 0) + said[k] for k in ("duplicates", "missing")}
    assert (record["duplicates"], record["missing"]) == (0, 0)
