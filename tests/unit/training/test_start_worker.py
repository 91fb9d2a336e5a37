"""A worker that torchrun starts takes its own GPU before the first collective; CUDA and NCCL are replaced."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pipeline.training.worker import start_process_group
from scldm.errors import InputError


@pytest.fixture
def calls(monkeypatch):
    """What was called, in order, on a machine with two GPUs."""
    found: list[tuple[object, ...]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(("set_device", device)))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, device_id=None: found.append(("init", backend, device_id))
    )
    return found


def test_the_gpu_of_the_local_rank_is_set_before_the_process_group_and_named_to_it(calls, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    start_process_group()
    assert calls == [("set_device", torch.device("cuda", 1)), ("init", "nccl", torch.device("cuda", 1))]


def test_a_worker_without_a_gpu_of_its_own_is_refused_before_any_collective(calls, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match=r"worker 2 of this machine has no GPU, there are 2; .* --nproc_per_node 2"):
        start_process_group()
    assert calls == []


def test_workers_without_any_gpu_talk_over_gloo(calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    start_process_group()
    assert calls == [("init", "gloo", None)]
