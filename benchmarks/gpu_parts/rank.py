"""One rank of `gpu_parts.programs.ranks`, under torchrun: NCCL's speed, and our engine with ZeRO 0 to 3.

torchrun --standalone --nproc_per_node=2 benchmarks/gpu_parts/rank.py RESULT.json [--rehearse]
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from gpu_parts.clock import timed, wait
from gpu_parts.plan import Measured, described
from gpu_parts.sizes import Sizes, make_cells, products, real_sizes, rehearsal_sizes
from pipeline.config.train import VaeTrainConfig
from pipeline.training.engine.deepspeed import Engine
from pipeline.training.worker import start_process_group
from scldm.nn.vae import VAE
from scldm.optim.adamw import adamw
from scldm.optim.config import OptimizerConfig

REDUCED = 2**28  # bytes
STEPS = 5
STAGES = (0, 1, 2, 3)
APART = {"fp32": 1e-4, "bf16": 2e-2}  # relative difference of losses after some steps, between ZeRO stages


def main() -> None:
    rehearse = "--rehearse" in sys.argv
    sizes = rehearsal_sizes() if rehearse else real_sizes()
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if rehearse else "cuda")
    start_process_group()
    rows, errors = [], []
    world = dist.get_world_size()
    if world > 1:
        rows.append(_reduction(sizes, rehearse))
    losses: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        for stage in STAGES:
            name = f"zero{stage}.{precision}.{world}"
            try:
                seconds, loss = _train(sizes, stage, precision)
            except Exception as error:  # the same on all ranks, or torchrun ends them
                errors.append(f"{name}: {described(error)}")
                continue
            rows.append(Measured(f"{name}.step", sizes.batches[0] * world / seconds, "cells/s", n=STEPS))
            losses[name] = loss
            first = losses.setdefault(precision, loss)
            if not abs(loss - first) <= APART[precision] * abs(first):
                errors.append(f"{name}: loss {loss:.6g} after {STEPS} steps, ZeRO 0 had {first:.6g}")
    if dist.get_rank() == 0:
        found = {"rows": [asdict(row) for row in rows], "errors": errors}
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _reduction(sizes: Sizes, rehearse: bool) -> Measured:
    """Bytes per second that an all-reduce of a large tensor moves, by the usual measure 2 (n - 1) / n x size / time."""
    x = torch.ones((2**16 if rehearse else REDUCED) // 4, device=sizes.device)
    found = timed(lambda: dist.all_reduce(x), sizes.device, seconds=0.0 if rehearse else 1.0)
    n = dist.get_world_size()
    return Measured("all_reduce", 2 * (n - 1) / n * x.nbytes / found.seconds / 1e9, "GB/s", n=found.n)


def _train(sizes: Sizes, stage: int, precision: str) -> tuple[float, float]:
    """Seconds of a step of the smallest VAE, and the loss after some."""
    torch.manual_seed(0)
    config = next(iter(sizes.vaes.values()))
    vae = VAE(config, n_genes=sizes.n_genes).to(sizes.device)
    batch = sizes.batches[0]
    train = VaeTrainConfig.model_validate({
        "zero_stage": stage, "precision": precision, "optimizer": {"lr": 1e-4},
        "feed": {"batch_size": batch * dist.get_world_size(), "micro_batch_size": batch, "lanes": 2},
    })  # fmt: skip
    engine = Engine(vae, adamw(vae, OptimizerConfig(lr=1e-4)), train, micro_batch_size=batch, accumulation=1)
    cells, loss = make_cells(batch, sizes), torch.zeros(())
    started = 0.0
    for step in range(STEPS + 2):
        if step == 2:  # two warm the device up
            wait(sizes.device)
            started = time.perf_counter()
        with products(precision, sizes.device):
            loss = engine(cells).mean()
        engine.backward(loss)
        engine.step(1e-4)
    wait(sizes.device)
    return (time.perf_counter() - started) / STEPS, float(loss.detach())


if __name__ == "__main__":
    main()
