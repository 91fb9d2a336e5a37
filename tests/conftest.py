"""One local Ray cluster for a test session, a small disk, and a record of what a test of the fault matrix measured."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

RECORDS = "SCLDM_RECORDS"  # a folder; each test that proves rows of the matrix leaves a JSON there
MEASURED = pytest.StashKey[dict]()


@pytest.fixture
def record(request):
    """What a test adds to its record: recover_s, lost_steps, duplicates, missing, goodput, peak_rss_mb, …"""
    return request.node.stash.setdefault(MEASURED, {})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    rows = [name for mark in item.iter_markers("row") for name in mark.args]
    folder = os.environ.get(RECORDS)
    if rows and folder and (report.when == "call" or report.outcome != "passed"):
        found = {"rows": rows, "test": item.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        path = Path(folder) / (re.sub(r"[^A-Za-z0-9_.-]+", "-", item.nodeid)[-180:] + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**found, "at": time.time(), **item.stash.get(MEASURED, {})}, indent=1))
    return report


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def ray_cluster():
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    ray.init(
        address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False,
        configure_logging=False,
    )  # fmt: skip
    yield
    ray.shutdown()
