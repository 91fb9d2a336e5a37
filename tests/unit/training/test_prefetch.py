"""Steps prepared ahead: the same steps in the same order, errors and ends included."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from pipeline.data.loading.feed import FeedStep
from pipeline.training.callbacks.step_timer import StepTimer
from pipeline.training.objectives.base import MicroBatchIndex, map_tensors
from pipeline.training.objectives.distil import TrajectoryBatch
from pipeline.training.objectives.flow import Draws, FlowBatch
from pipeline.training.objectives.joint import JointBatch
from pipeline.training.objectives.vae import VaeBatch
from pipeline.training.prefetch import copy_to_gpu, prefetch
from scldm.data.batch import CellBatch
from scldm.nn.likelihood import GeneSample

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    x: Tensor
    more: dict[str, Tensor]
    none: Tensor | None = None


def steps(n: int, log: list[str] | None = None):
    try:
        for i in range(n):
            if log is not None:
                log.append(threading.current_thread().name)
            yield FeedStep(i, i // 2, [pa.table({"x": [i, i]}), pa.table({"x": [-i]})], 3)
    finally:
        if log is not None:
            log.append("closed")


def prepare(table: pa.Table, index: MicroBatchIndex) -> Batch:
    x = torch.tensor(table["x"].to_pylist())
    return Batch(x, {"start": torch.tensor(index.start)})


def test_steps_come_in_order_with_the_index_of_every_micro_batch():
    found = list(prefetch(steps(5), prepare, CPU))
    assert [(at.step, at.epoch, at.real_cells) for at in found] == [(i, i // 2, 3) for i in range(5)]
    for i, at in enumerate(found):
        assert [(index.start, batch.x.tolist(), int(batch.more["start"])) for index, batch in at.micro_batches()] == [
            (0, [i, i], 0),
            (2, [-i], 2),
        ]


def test_tables_are_read_in_a_thread_of_their_own_which_ends_with_the_loop():
    log: list[str] = []
    ready = prefetch(steps(100, log), prepare, CPU)
    next(ready)
    ready.close()
    assert log[0] == "prefetch"
    assert log[-1] == "closed"
    assert len(log) < 10, "a step or two ahead, not all"
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_an_error_in_the_thread_is_raised_where_the_steps_are_used():
    def fails(table: pa.Table, index: MicroBatchIndex) -> Batch:
        if index.step == 2:
            raise ValueError("a bad cell")
        return prepare(table, index)

    ready = prefetch(steps(5), fails, CPU)
    assert [next(ready).step, next(ready).step] == [0, 1]
    with pytest.raises(ValueError, match="a bad cell"):
        next(ready)


def test_every_tensor_of_a_batch_is_moved():
    moved = map_tensors(Batch(torch.ones(2), {"a": torch.ones(1)}), lambda x: x + 1)
    assert moved.x.tolist() == [2, 2]
    assert moved.more["a"].tolist() == [2]
    assert moved.none is None


def batches() -> dict[str, Any]:
    """A batch of every training, with each tensor that it may have."""
    ids, numbers = torch.arange(2), torch.ones(2)  # some fields share them
    cells = CellBatch.from_dense(torch.tensor([[1.0, 2], [0, 3]]), {"cell_type": ids})
    cells = replace(cells, measured=torch.ones(2, 2, dtype=torch.bool))
    sample = GeneSample(ids, numbers, ids)
    vae, draws = VaeBatch(cells, cells, sample, ids), Draws(torch.ones(2, 1, 1), numbers, numbers)
    conditions = MappingProxyType({"cell_type": ids, "donor": ids})
    return {
        "vae": vae,
        "flow": FlowBatch(torch.ones(2, 1, 1), conditions, draws, ids, numbers),
        "joint": JointBatch(vae, draws),
        "distil": TrajectoryBatch(torch.ones(2, 2, 1, 1), conditions, ids, numbers),
    }


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Every tensor that an object refers to, however it holds it."""
    todo, seen = [batch], set()
    while todo:
        at = todo.pop()
        if id(at) in seen or isinstance(at, type):
            continue
        seen.add(id(at))
        if isinstance(at, Tensor):
            yield at
        else:
            todo += gc.get_referents(at)


@pytest.mark.parametrize("training", ["vae", "flow", "joint", "distil"])
def test_every_tensor_of_a_batch_is_pinned_and_copied_without_waiting(training, monkeypatch):
    """Pinning is recorded, as it needs a GPU; the copy goes to torch's device without memory."""
    batch = batches()[training]
    before, pinned, copies = list(tensors_in(batch)), [], []
    copy = Tensor.to

    def pin(x: Tensor) -> Tensor:
        pinned.append(x.clone())
        return pinned[-1]

    def recorded(x: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        copies.append((any(x is p for p in pinned), non_blocking))
        return copy(x, device)

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", recorded)
    moved = copy_to_gpu(batch, torch.device("meta"))
    assert len(before) >= 3
    assert {x.device.type for x in tensors_in(moved)} == {"meta"}
    assert len(copies) >= len(before)
    assert set(copies) == {(True, True)}


def test_the_timer_returns_mean_seconds_since_the_last_call():
    now = iter([0.0, 1.0, 5.0, 8.0, 10.0, 10.5])
    timer = StepTimer(lambda: next(now))
    with timer.measure("step"):  # 1 s
        pass
    with timer.measure("step"):  # 3 s
        pass
    waited = timer.measure_waits("data_wait", iter([7]))
    assert next(waited) == 7  # 0.5 s
    assert timer.take() == {"perf/step_s": 2.0, "perf/data_wait_s": 0.5}
    assert timer.take() == {}
