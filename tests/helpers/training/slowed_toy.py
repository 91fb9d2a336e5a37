"""Train a toy whose parameters, and rows of one of them, have learning rates of their own, and the same by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers.training.elastic_toy import FIRST_STOP, SETTINGS, SignalAt
from helpers.training.toy_training import BATCH, FEED, STEPS, Toy, cells
from pipeline.config.train import TrainConfig
from pipeline.data.loading.feed import feed
from pipeline.data.loading.order import FeedOrder
from pipeline.tracking.tracker import NullTracker
from pipeline.training.loop import run_training
from pipeline.training.state import Run, Stopped
from scldm.optim.schedule import learning_rate_factor

OPTIMIZER = {"lr": 1e-2, "weight_decay": 0.1}
RATES: dict[str, float | Tensor] = {
    "0.weight": torch.tensor([1.0, 0.1, 0.1, 1.0, 0.5, 0.1, 1.0, 0.1]),  # (8, 4): a table with old and new rows
    "0.bias": 0.25,
}
PLAIN = {name: settings for name, settings in SETTINGS.items() if "cautious" not in name}


def straight(folder: Path) -> None:
    """Every setting: one step with and without rates, and all steps; in another folder up to a stop signal."""
    _begin()
    for name, settings in PLAIN.items():
        _train(folder / name / "one", settings, RATES, steps=1)
        _train(folder / name / "one_plain", settings, {}, steps=1)
        _train(folder / name / "all", settings, RATES)
        _train(folder / name / "bent", settings, RATES, stop=FIRST_STOP)
    dist.destroy_process_group()


def resumed(folder: Path) -> None:
    """Every setting from the stop to the end."""
    _begin()
    for name, settings in PLAIN.items():
        _train(folder / name / "bent", settings, RATES)
    dist.destroy_process_group()


def _begin() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")


def _train(
    folder: Path, settings: dict[str, Any], rates: dict[str, Any], *, steps: int = STEPS, stop: int | None = None
) -> None:
    """Train and write the optimizer's own fp32 weights."""
    base = {"max_steps": steps, "validate_every": STEPS, "checkpoint_every": 100, "feed": FEED, "optimizer": OPTIMIZER}
    config = TrainConfig.model_validate({**base, **settings})
    folder.mkdir(parents=True, exist_ok=True)
    source, toy = cells(), Toy(None, [])
    order = FeedOrder(source.ids, source.tile, 0, BATCH, FEED["lanes"], FEED["block_rows"])
    run = Run(folder, "v", "local", NullTracker())
    try:
        callbacks = [] if stop is None else [SignalAt(stop)]
        done = run_training(toy, source, order, config, run, callbacks=callbacks, rates=rates)
    except Stopped:
        return
    done.close()
    state = done.engine.export_state(done.checkpoint)
    if dist.get_rank() == 0:
        (folder / "done.json").write_text(json.dumps({k: v.tolist() for k, v in state.items()}))


def by_hand() -> dict[str, Tensor]:
    """Train with AdamW written out, each element with its own learning rate; one worker, fp32."""
    config = TrainConfig.model_validate({"max_steps": STEPS, "feed": FEED, "optimizer": OPTIMIZER}).optimizer
    source, toy = cells(), Toy(None, [])
    order = FeedOrder(source.ids, source.tile, 0, BATCH, FEED["lanes"], FEED["block_rows"])
    beta1, beta2 = config.betas
    named = dict(toy.module.named_parameters())
    first, second = ({n: torch.zeros_like(p) for n, p in named.items()} for _ in range(2))
    for at in feed(
        source, order, rank=0, world_size=1, start_step=0, stop_step=STEPS, micro_batch_size=BATCH, engine="local"
    ):
        batch, k = toy.prepare(at.micro[0], None), at.step + 1
        toy.module.zero_grad()
        ((toy.loss(toy.module, batch, None) * batch.weight).sum() / at.real_cells).backward()
        nn.utils.clip_grad_norm_(toy.module.parameters(), config.clip)
        lr = config.lr * learning_rate_factor(at.step, STEPS, config)
        with torch.no_grad():
            for name, p in named.items():
                factor = RATES.get(name, 1.0)
                rate = lr * (factor[:, None] if isinstance(factor, Tensor) else factor)
                first[name] = beta1 * first[name] + (1 - beta1) * p.grad
                second[name] = beta2 * second[name] + (1 - beta2) * p.grad**2
                m, v = first[name] / (1 - beta1**k), second[name] / (1 - beta2**k)
                p.copy_(p - rate * (config.weight_decay * p + m / (v.sqrt() + 1e-8)))
    return {n: p.detach() for n, p in named.items()}
