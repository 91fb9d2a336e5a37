"""A function runs in a child process as it would here: its items, its errors, its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from pathlib import Path

import psutil
import pytest
from helpers.training import children

from pipeline.cluster import connect as cluster
from pipeline.cluster.child import WORKER_LOG, ChildDied, environment, in_child
from pipeline.config.job import ResourcesConfig
from scldm.errors import InputError

ALONE = ResourcesConfig(ray=False, workers=1)
TESTS = str(Path(__file__).resolve().parents[2])


@pytest.fixture(autouse=True)
def _helpers_are_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")]))


def gone(pid: int, within: float = 20) -> bool:
    until = time.monotonic() + within
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_items_come_back_in_order(tmp_path):
    assert list(in_child(children.numbers, 5, resources=ALONE, folder=tmp_path)) == [0, 1, 2, 3, 4]
    assert (tmp_path / WORKER_LOG).read_text() == ""


def test_an_error_keeps_its_type_and_says_where_it_arose(tmp_path):
    found = in_child(children.refused, resources=ALONE, folder=tmp_path)
    assert next(found) == 1
    with pytest.raises(InputError, match=r"cells\.h5ad: not counts") as raised:
        next(found)
    assert "in refused" in "".join(traceback.format_exception(raised.value))


def test_an_error_that_cannot_be_sent_comes_in_words(tmp_path):
    with pytest.raises(RuntimeError, match="Local: only here"):
        list(in_child(children.not_portable, resources=ALONE, folder=tmp_path))


def test_a_killed_child_is_an_error_with_its_last_words(tmp_path):
    with pytest.raises(ChildDied, match=r"signal 9(.|\n)*last words"):
        list(in_child(children.killed, resources=ALONE, folder=tmp_path))


def test_a_child_that_is_no_longer_asked_ends(tmp_path):
    found = in_child(children.waits, tmp_path / "pid", resources=ALONE, folder=tmp_path)
    pid = next(found)
    found.close()
    assert gone(pid)


def test_processes_that_a_child_started_end_with_it(tmp_path):
    found = in_child(children.starts_another, resources=ALONE, folder=tmp_path)
    pid = next(found)
    assert psutil.pid_exists(pid)
    found.close()
    assert gone(pid)


def test_a_child_ends_with_its_parent_even_if_that_is_killed(tmp_path):
    code = f"""
        from pathlib import Path
        from helpers.training import children
        from pipeline.cluster.child import in_child
        from pipeline.config.job import ResourcesConfig
        folder = Path({str(tmp_path)!r})
        alone = ResourcesConfig(ray=False, workers=1)
        for other in in_child(children.starts_another, resources=alone, folder=folder):
            (folder / "pid").write_text(str(other))
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    pid_file, until = tmp_path / "pid", time.monotonic() + 60
    while not (pid_file.is_file() and pid_file.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(pid)


def test_without_gpus_the_child_sees_none(tmp_path):
    names = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS")
    found = next(iter(in_child(children.told_environment, *names, resources=ALONE, folder=tmp_path)))
    assert found == {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with_gpu = environment(ResourcesConfig(ray=False, workers=1, gpus_per_worker=1))
    assert with_gpu.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_what_needs_ray_is_refused_without_it():
    with pytest.raises(
        ValueError, match=r"resources\.workers is a range(.|\n)*starts with 2(.|\n)*gpus_per_worker is 0\.5"
    ):
        ResourcesConfig(ray=False, workers={"min": 1, "max": 2}, actors={"min": 2, "max": 3}, gpus_per_worker=0.5)


def test_a_cluster_and_no_ray_contradict_each_other(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(InputError, match="unset one"), cluster.connect(ALONE):
        pass


def test_the_setting_is_in_no_record_unless_it_is_set():
    assert "ray" not in ResourcesConfig().model_dump()
    assert ALONE.model_dump()["ray"] is False
