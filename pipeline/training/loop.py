"""The training loop: the same for the VAE and for the flow, under Ray Train and under torchrun.

A step is one global batch. Its learning rate, its cells and its randomness are functions of (seed, step), so a run
that was killed and goes on from a checkpoint does what the uninterrupted run would have done.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.data.feed import FeedStep, feed
from pipeline.data.order import FeedOrder
from pipeline.job import TrainConfig
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Position
from pipeline.training.curve import LOG_EVERY, TrainingCurve
from pipeline.training.engine import Engine
from scldm.optim.ema import EMA
from scldm.optim.schedule import learning_rate_factor


@dataclass(frozen=True)
class Slice:
    """Which part of a step a micro batch is."""

    step: int
    epoch: int
    start: int  # first row of the micro batch among this worker's rows of the step


class Objective(Protocol):
    """What is trained."""

    module: nn.Module
    validate_with_ema: bool

    def loss(self, model: Callable[..., Tensor], table: pa.Table, part: Slice) -> tuple[Tensor, Tensor]:
        """Loss of each cell of a micro batch, and its weight; both (b,)."""

    def validation(self, rank: int, world_size: int) -> tuple[float, int]:
        """Sum of the loss over this worker's share of the validation cells, and their number."""


@dataclass(frozen=True)
class Run:
    """Where and for whom the loop works."""

    folder: Path  # of the stage
    config_hash: str
    feed_engine: Literal["ray", "local"]
    tracker: Any
    on_checkpoint: Callable[[dict[str, float]], None] = lambda metrics: None


@dataclass
class Trained:
    """What the loop leaves behind."""

    engine: Engine
    ema: EMA | None
    checkpoint: Path
    metrics: dict[str, float]


def accumulation_of(config: TrainConfig, world_size: int) -> tuple[int, int]:
    """(micro batch size, micro batches per step) of a worker; the global batch is what the config says."""
    rows = config.feed.batch_size // world_size
    micro = min(config.feed.micro_batch_size, rows)
    return micro, -(-rows // micro)


def run_training(
    objective: Objective, source: Any, order: FeedOrder, config: TrainConfig, run: Run, *, ema_config: Any = None
) -> Trained:
    """Train to max_steps, from the newest checkpoint that verifies or from the start. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    micro, accumulation = accumulation_of(config, world_size)
    optimizer = _optimizer(objective.module, config)
    engine = Engine(objective.module, optimizer, config, micro_batch_size=micro, accumulation=accumulation)
    with engine.whole_parameters():
        ema = None if ema_config is None else EMA(engine.module, ema_config)
    here = lambda step: _position(step, order, config, run, world_size)  # noqa: E731
    start, latest = _resume(engine, ema, here(0), run)
    log = TrainingCurve(run.folder, run.tracker, config, start, order) if rank == 0 else None
    steps = feed(
        source, order, rank=rank, world_size=world_size, start_step=start, stop_step=config.max_steps,
        micro_batch_size=micro, engine=run.feed_engine,
    )  # fmt: skip
    metrics: dict[str, float] = {}
    total, counted = torch.zeros((), dtype=torch.float64), 0
    for feed_step in steps:
        step = feed_step.step + 1  # steps done after this one
        lr = config.optimizer.lr * learning_rate_factor(feed_step.step, config.max_steps, config.optimizer)
        total += _step(engine, objective, feed_step, lr, accumulation, world_size)
        counted += feed_step.real_cells
        if ema is not None:
            with engine.whole_parameters():
                ema.update(step)
        if step % LOG_EVERY == 0 or step == config.max_steps:
            metrics |= {"train/loss": _mean(total, counted, engine.device), "train/lr": lr}
            _must_be_finite(metrics["train/loss"], step, feed_step)
            total, counted = torch.zeros((), dtype=torch.float64), 0
        if step % config.validate_every == 0 or step == config.max_steps:
            metrics |= {"val/loss": _validate(objective, engine, ema)}
        if log is not None:
            log.write(step, metrics, engine.grad_norm)
        if step % config.checkpoint_every == 0 or step == config.max_steps:
            latest = _save(engine, ema, here(step), run, config)
            run.on_checkpoint({"step": step, **metrics})
    assert latest is not None
    return Trained(engine, ema, latest, metrics or (log.last() if log is not None else {}))


def _step(
    engine: Engine, objective: Objective, feed_step: FeedStep, lr: float, accumulation: int, world_size: int
) -> Tensor:
    """One global batch; the sum of this worker's losses."""
    total = torch.zeros((), dtype=torch.float64)
    start = 0
    for table in feed_step.micro:
        loss, weight = objective.loss(engine, table, Slice(feed_step.step, feed_step.epoch, start))
        summed = (loss * weight).sum()
        # The engine divides by accumulation and world size; what remains is the mean over the real cells of the batch.
        engine.backward(summed * (accumulation * world_size / feed_step.real_cells))
        engine.step(lr)
        total += summed.detach().cpu().double()
        start += table.num_rows
    return total


def _optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    o = config.optimizer
    if o.cautious:
        from scldm.optim.adamw import CautiousAdamW

        return CautiousAdamW(parameters, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, caution=True)
    return torch.optim.AdamW(parameters, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True)


def _position(step: int, order: FeedOrder, config: TrainConfig, run: Run, world_size: int) -> Position:
    epoch, offset = divmod(step, order.n_steps_per_epoch)
    return Position(step, epoch, offset, world_size, run.config_hash, config.zero_stage)


def _resume(engine: Engine, ema: EMA | None, start: Position, run: Run) -> tuple[int, Path | None]:
    """Load the newest checkpoint that verifies, chosen by rank 0 for all."""
    chosen: list[Any] = [None]
    if dist.get_rank() == 0:
        found, rejected = checkpoint.newest(run.folder / "checkpoints")
        for line in rejected:
            print(f"checkpoint passed over: {line}", flush=True)
        chosen = [found]
    dist.broadcast_object_list(chosen)
    found = chosen[0]
    if found is None:
        return 0, None
    checkpoint.check_fits(found, start)
    engine.load(found.folder)
    if ema is not None:
        ema.load_state_dict(torch.load(found.folder / "ema.pt", weights_only=True, map_location=engine.device))
    return found.position.step, found.folder


def _save(engine: Engine, ema: EMA | None, position: Position, run: Run, config: TrainConfig) -> Path:
    def write(folder: Path) -> None:
        engine.save(folder, position.__dict__)
        if ema is not None and dist.get_rank() == 0:
            torch.save(ema.state_dict(), folder / "ema.pt")

    return checkpoint.save(run.folder / "checkpoints", position, write, keep_last=config.keep_last)


def _validate(objective: Objective, engine: Engine, ema: EMA | None) -> float:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with engine.whole_parameters(), torch.no_grad():
        if ema is not None and objective.validate_with_ema:
            with ema.swapped(engine.module):
                total, n = objective.validation(rank, world_size)
        else:
            total, n = objective.validation(rank, world_size)
    sums = torch.tensor([total, n], dtype=torch.float64, device=engine.device)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])


def _mean(total: Tensor, cells: int, device: torch.device) -> float:
    total = total.to(device)
    dist.all_reduce(total)
    return float(total) / cells


def _must_be_finite(loss: float, step: int, feed_step: FeedStep) -> None:
    if not math.isfinite(loss):
        cells = [int(i) for table in feed_step.micro for i in table["soma_joinid"].to_pylist()]
        raise FloatingPointError(
            f"the training loss is {loss} at step {step}; lower train.optimizer.lr or train.optimizer.clip. "
            f"This worker's cells of the step have soma_joinid {cells[:8]}, …"
        )
