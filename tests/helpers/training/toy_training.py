"""Train a small network on a few dozen cells with the real loop, for what the loop does when steps go wrong.

Run by torchrun on two workers: `toy_training.py FOLDER policies` runs every scenario in turn and writes what came of it
to FOLDER/results.json; `toy_training.py FOLDER hang` trains with a worker that falls asleep.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config.train import TrainConfig
from pipeline.core.logs import setup_logging
from pipeline.data.loading.feed import feed
from pipeline.data.loading.order import FeedOrder
from pipeline.tracking.tracker import NullTracker
from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.callbacks.early_stopping import EarlyStopping
from pipeline.training.callbacks.step_guard import StepGuard
from pipeline.training.loop import run_training
from pipeline.training.state import Run, TrainingStopped
from scldm.optim.config import EMAConfig
from scldm.optim.schedule import learning_rate_factor

CELLS, STEPS, BATCH = 48, 12, 8  # two epochs
ODD_CELL = 5
FEED = {"batch_size": BATCH, "micro_batch_size": 2, "lanes": 2, "block_rows": 16}


@dataclass(frozen=True)
class Cells:
    """A source of blocks in memory."""

    x: np.ndarray  # (n, 4)
    tile: int = 8

    @property
    def ids(self) -> np.ndarray:
        return np.arange(len(self.x), dtype=np.int64)

    def read(self, ids: np.ndarray) -> pa.Table:
        values = pa.FixedSizeListArray.from_arrays(pa.array(self.x[ids].reshape(-1)), self.x.shape[1])
        return pa.table({"soma_joinid": ids, "x": values})


@dataclass(frozen=True)
class Batch:
    x: Tensor
    joinids: Tensor
    weight: Tensor


class Toy:
    """Squared error of a small network that learns the sum of a cell's numbers."""

    validate_with_ema = True
    sample_scores: Mapping[str, float] = {}

    def __init__(self, harm: Callable[[Tensor, Batch, nn.Module], Tensor] | None, validation: list[float]):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
        self.harm, self.losses, self.calls = harm, validation, 0

    def prepare(self, table: pa.Table, part: Any) -> Batch:
        x = table["x"].combine_chunks().flatten().to_numpy().reshape(len(table), -1).copy()
        ids, weight = (torch.from_numpy(table[c].to_numpy().copy()) for c in ("soma_joinid", "weight"))
        return Batch(torch.from_numpy(x), ids, weight)

    def loss(self, model: Callable[..., Tensor], batch: Batch, part: Any) -> Tensor:
        x = batch.x.to(next(self.module.parameters()).dtype)
        loss = (model(x)[:, 0].float() - batch.x.sum(1)).square()
        return loss if self.harm is None else self.harm(loss, batch, self.module)

    def validation(self, rank: int, world_size: int) -> tuple[dict[str, float], int]:
        self.calls += 1
        return {"loss": self.losses[self.calls - 1] if self.losses else 1.0}, 1


def cells() -> Cells:
    return Cells(np.random.default_rng(0).normal(size=(CELLS, 4)).astype(np.float32))


def odd_loss(loss: Tensor, batch: Batch, module: nn.Module) -> Tensor:
    return torch.where(batch.joinids == ODD_CELL, torch.nan, 1.0) * loss


def odd_gradient(loss: Tensor, batch: Batch, module: nn.Module) -> Tensor:
    """Return a finite loss whose gradient is not finite: the root at zero."""
    odd, more = batch.joinids == ODD_CELL, torch.zeros_like(loss)
    more[odd] = (0 * loss[odd]).abs().sqrt()
    return loss + more


def leap(loss: Tensor, batch: Batch, module: nn.Module) -> Tensor:
    return torch.where(batch.joinids == ODD_CELL, 1e4, 1.0) * loss


def huge(loss: Tensor, batch: Batch, module: nn.Module) -> Tensor:
    return torch.where(batch.joinids == ODD_CELL, 1e6, 1.0) * loss


def all_odd(loss: Tensor, batch: Batch, module: nn.Module) -> Tensor:
    return loss * torch.nan


def train(
    folder: Path,
    harm: Any = None,
    validation: list[float] | None = None,
    callbacks: Sequence[TrainingCallback] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Run the loop once and return its results, with the weights of this worker's copy."""
    base = {"max_steps": STEPS, "validate_every": STEPS, "checkpoint_every": STEPS, "feed": FEED}
    config = TrainConfig.model_validate({**base, **settings})
    folder.mkdir(parents=True, exist_ok=True)
    source, toy = cells(), Toy(harm, validation or [])
    feed_ = config.feed
    order = FeedOrder(source.ids, source.tile, 0, feed_.batch_size, feed_.lanes, feed_.block_rows)
    run = Run(folder, "v", "local", NullTracker())
    try:
        trained = run_training(toy, source, order, config, run, ema_config=EMAConfig(decay=0.9), callbacks=callbacks)
    except TrainingStopped as stopped:
        return {"stopped": str(stopped)}
    trained.close()
    guard = next(c for c in trained.callbacks if isinstance(c, StepGuard))
    early = next(c for c in trained.callbacks if isinstance(c, EarlyStopping))
    with trained.engine.whole_parameters():
        weights = torch.cat([p.detach().float().flatten() for p in trained.engine.module.parameters()])
        average = torch.cat([x.flatten() for x in trained.ema.state_dict().values()])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": weights.tolist(), "average": average.tolist(), "skipped": guard.skipped,
        "spikes": guard.spikes, "steps": trained.steps, "exported": trained.exported_step,
        "early": early.stopped, "grad_norm": rows[-1].get("train/grad_norm"),
        "curve": [r["train/loss"] for r in rows if "train/loss" in r], "rows": rows,
    }  # fmt: skip


def by_hand(*, left_out: set[int], steps: int = STEPS) -> list[float]:
    """Train with plain torch on one worker, without the steps that hold these cells, and return the weights."""
    config = TrainConfig.model_validate({"max_steps": STEPS, "feed": FEED}).optimizer
    source, toy = cells(), Toy(None, [])
    order = FeedOrder(source.ids, source.tile, 0, BATCH, FEED["lanes"], FEED["block_rows"])
    module = toy.module
    optimizer = torch.optim.AdamW(module.parameters(), betas=config.betas, weight_decay=config.weight_decay)
    for at in feed(
        source, order, rank=0, world_size=1, start_step=0, stop_step=steps, micro_batch_size=BATCH, engine="local"
    ):
        batch = toy.prepare(at.micro[0], None)
        if left_out & set(batch.joinids.tolist()):
            continue
        optimizer.param_groups[0]["lr"] = config.lr * learning_rate_factor(at.step, STEPS, config)
        optimizer.zero_grad()
        ((toy.loss(module, batch, None) * batch.weight).sum() / at.real_cells).backward()
        nn.utils.clip_grad_norm_(module.parameters(), config.clip)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()


def toy_loss(weights: list[float]) -> float:
    """Return the mean loss of all cells but the odd one under some weights."""
    toy = Toy(None, [])
    nn.utils.vector_to_parameters(torch.tensor(weights), toy.module.parameters())
    x = torch.from_numpy(np.delete(cells().x, ODD_CELL, axis=0))
    with torch.no_grad():
        return float((toy.module(x)[:, 0] - x.sum(1)).square().mean())


def policies(folder: Path) -> dict[str, Any]:
    options = folder / "options.json"
    options.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": False}))
    untrained = torch.cat([p.detach().flatten() for p in Toy(None, []).module.parameters()])
    found: dict[str, Any] = {"untrained": untrained.tolist()}
    found |= {"by_hand": by_hand(left_out=set()), "by_hand_without": by_hand(left_out={ODD_CELL})}
    for stage in (0, 1, 2, 3):
        found[f"plain {stage}"] = train(folder / f"plain{stage}", zero_stage=stage)
        found[f"odd loss {stage}"] = train(folder / f"loss{stage}", odd_loss, zero_stage=stage)
        found[f"odd gradient {stage}"] = train(folder / f"gradient{stage}", odd_gradient, zero_stage=stage)
    for stage in (1, 2, 3):
        found[f"offload {stage}"] = train(folder / f"offload{stage}", zero_stage=stage, offload_optimizer="cpu")
    found["options"] = train(folder / "options", zero_stage=2, deepspeed=str(options))
    found["odd loss in bf16"] = train(folder / "bf16", odd_loss, precision="bf16")
    found["stop"] = train(folder / "stop", odd_loss, non_finite="stop")
    found["all odd"] = train(folder / "all", all_odd, max_skipped=3)
    small = {**FEED, "batch_size": 4, "micro_batch_size": 4}
    spike = {"factor": 20.0, "window": 20}
    found["spike logged"] = train(folder / "logged", leap, feed=small, spike=spike, max_steps=24)
    found["spike left out"] = train(folder / "left", leap, feed=small, spike={**spike, "action": "skip"}, max_steps=24)
    longer = {"max_steps": 240, "optimizer": {"lr": 1e-2}}
    found["longer"] = train(folder / "longer", **longer)
    found["a million times"] = train(folder / "million", huge, **longer)
    early = {"validate_every": 1, "checkpoint_every": 3, "export": "best", "keep_last": 1}
    losses = [5.0, 4.0, 3.0, 3.5, 2.99, 3.2, 3.1, 3.0]
    found["early"] = train(
        folder / "early", validation=losses, early_stopping={"patience": 3, "min_delta": 0.1}, **early
    )
    found["early by hand"] = by_hand(left_out=set(), steps=5)
    return found


def hang(folder: Path) -> None:
    def sleeps(loss: Tensor, batch: Batch, module: nn.Module) -> Tensor:
        sleeps.calls += 1  # type: ignore[attr-defined]
        if dist.get_rank() == 1 and sleeps.calls > 4:  # type: ignore[attr-defined]  # in its third step
            time.sleep(3600)
        return loss

    sleeps.calls = 0  # type: ignore[attr-defined]
    train(folder / "hang", sleeps, step_timeout_s=float(sys.argv[3]))


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    setup_logging(stage="toy", rank=dist.get_rank())
    if sys.argv[2] == "hang":
        hang(folder)
        return
    mine = policies(folder)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(everyone))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
