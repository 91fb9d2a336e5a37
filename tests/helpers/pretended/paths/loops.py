"""Paths of the training loop itself: DeepSpeed's engine on the device, checkpoints, resuming, skipped steps.

DeepSpeed runs as on a GPU, with its CUDA accelerator, in a group of one worker. What only several workers do (who holds
which part, NCCL) is not shown.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from helpers.pretended.device import CUDA
from helpers.pretended.paths import Paths
from helpers.pretended.small import (
    WIDE,
    cells_table,
    flow_draws,
    flow_objective,
    latents_table,
    small_dit,
    vae_objective,
)
from pipeline.config.train import TrainConfig
from pipeline.data.loading.order import FeedOrder
from pipeline.tracking.tracker import NullTracker
from pipeline.training.callbacks.step_guard import StepGuard
from pipeline.training.engine.partitions import base_optimizer, flats_of
from pipeline.training.loop import TrainingResult, run_training
from pipeline.training.state import Run
from scldm.optim.config import EMAConfig

CELLS, BATCH = 24, 8
WORKER = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cuda"}
FEED = {"batch_size": BATCH, "micro_batch_size": 4, "lanes": 1, "block_rows": BATCH}


@dataclass(frozen=True)
class Rows:
    """A source of blocks in memory."""

    table: pa.Table
    tile: int = 8

    @property
    def ids(self) -> np.ndarray:
        return np.arange(len(self.table), dtype=np.int64)

    def read(self, ids: np.ndarray) -> pa.Table:
        return self.table.take(pa.array(ids)).drop_columns(["weight"])


def paths(folder: Path) -> Paths:
    found: Paths = {}
    for stage, precision in ((0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")):
        name = f"ZeRO {stage}, {precision}"
        found[name] = _resumes(folder / name, zero_stage=stage, precision=precision)
    found |= {
        "a flow": _resumes(folder / "flow", flow=True),
        "a loss that is not finite": lambda: _skips(folder / "skip"),
        "the best checkpoint is exported": _resumes(folder / "best", export="best"),
    }
    return found


@cache
def _alone() -> None:
    """Make this process a group of one worker, once."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _train(folder: Path, objective: Any, table: pa.Table, **settings: Any) -> TrainingResult:
    with mock.patch.dict(os.environ, WORKER):
        _alone()
        base = {"max_steps": 4, "validate_every": 2, "checkpoint_every": 2, "feed": FEED}
        config = TrainConfig.model_validate({**base, **settings})
        # DeepSpeed moves the network to its device; here it is there already, and DeepSpeed finds nothing to move.
        objective.module.to(CUDA)
        source, run = Rows(table), Run(folder, "v", "local", NullTracker())
        order = FeedOrder(source.ids, source.tile, 0, BATCH, 1, BATCH)
        result = run_training(objective, source, order, config, run, ema_config=EMAConfig())
        result.close()
        return result


def _objective(flow: bool) -> tuple[Any, pa.Table]:
    if flow:
        draws = flow_draws(BATCH)
        return flow_objective(small_dit(), draws=draws, validation=[latents_table()]), latents_table(CELLS)
    return vae_objective(WIDE, genes_per_step=20), cells_table(CELLS)


def _resumes(folder: Path, *, flow: bool = False, **settings: Any) -> Callable[[], None]:
    """Return a path: four steps, and two more by another run that resumes from the checkpoint of the fourth."""

    def path() -> None:
        table, saved = _four_steps(folder, flow, settings)
        longer, _ = _objective(flow)
        loss, taken = longer.loss, set()
        longer.loss = lambda model, batch, index: (taken.add(index.step), loss(model, batch, index))[1]
        second = _train(folder, longer, table, **{**settings, "max_steps": 6})
        assert second.steps == 6
        assert taken == {4, 5}, "it did not go on from the checkpoint"
        assert np.isfinite(second.metrics["val/loss"])
        assert any(bool((saved[name] != weight).any()) for name, weight in _weights(second).items())

    return path


def _four_steps(folder: Path, flow: bool, settings: dict[str, Any]) -> tuple[pa.Table, dict[str, torch.Tensor]]:
    """Train; return the cells and the weights."""
    folder.mkdir(parents=True)
    objective, table = _objective(flow)
    first = _train(folder, objective, table, **settings)
    assert first.engine.device == CUDA
    assert first.engine.grad_norm is not None
    assert first.engine.grad_norm > 0
    _precisions(first)
    return table, _weights(first)


def _precisions(result: TrainingResult) -> None:
    """What must not lose digits is in fp32: weights, moments, the average, and sums of gradients."""
    engine, deepspeed = result.engine, result.engine._engine
    for flat in flats_of(engine.optimizer, engine.module, rank=0):
        moments = base_optimizer(engine.optimizer).state[flat.tensor]
        for value in (flat.tensor, moments["exp_avg"], moments["exp_avg_sq"]):
            assert value.dtype == torch.float32
            assert value.is_cuda
    assert result.ema is not None
    assert {x.dtype for x in result.ema.shadow.values()} == {torch.float32}
    assert deepspeed.communication_data_type == torch.float32
    assert deepspeed.get_data_types()[1] == torch.float32
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}


def _weights(result: TrainingResult) -> dict[str, torch.Tensor]:
    return result.engine.export_state(result.checkpoint)


def _skips(folder: Path) -> None:
    """A cell whose loss is not finite costs its step, and is named."""
    folder.mkdir(parents=True)
    objective, table = _objective(flow=False)
    loss = objective.loss
    objective.loss = lambda model, batch, index: (
        torch.where(batch.joinids == 5, torch.nan, 1.0) * loss(model, batch, index)
    )
    result = _train(folder, objective, table, validate_every=4, checkpoint_every=4)
    guard = next(c for c in result.callbacks if isinstance(c, StepGuard))
    assert guard.skipped >= 1
