"""Paths of the training of a flow, alone and with its VAE, and of what samplers do with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch

from helpers.pretended.device import CUDA
from helpers.pretended.paths import Paths
from helpers.pretended.small import (
    CELLS,
    CLASSES,
    NARROW,
    SHAPE,
    cells_table,
    flow_draws,
    flow_objective,
    latents_table,
    small_dit,
    train,
    vae_objective,
)  # fmt: skip
from pipeline.data.loading.blocks import IpcBlocks
from pipeline.data.loading.order import FeedOrder
from pipeline.training.objectives.controls import ControlStarts
from pipeline.training.objectives.distil import DistilObjective
from pipeline.training.objectives.flow import FlowDraws
from pipeline.training.objectives.joint import Joint, JointObjective
from scldm.flow.config import PathConfig, SamplerConfig, Solver
from scldm.flow.distilled import jump_times
from scldm.flow.guidance import guided_velocity
from scldm.flow.sampler import sample_latents
from scldm.flow.sde import SDEOptions, solve_sde
from scldm.flow.transport import ControlCells
from scldm.nn.config import DiTConfig
from scldm.nn.dit import ClassFeatures
from scldm.optim.config import EMAConfig, LoraConfig, OptimizerConfig
from scldm.optim.lora import add_adapters
from scldm.optim.short_flow import ShortTraining, new_dit, train_flow

PATHS = {
    "velocity": PathConfig(),
    "noise of gvp": PathConfig(path="gvp", prediction="noise", weight="likelihood"),
    "score of vp": PathConfig(path="vp", prediction="score", weight="velocity"),
}
DIFFUSIONS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing")
CONDITIONS = {"cell_type": torch.tensor([0, 1, 2, 3, 0, 1])}  # the last class is null


def paths(folder: Path) -> Paths:
    latents = latents_table()
    found: Paths = {}
    for strategy in ("joint", "mutually_exclusive"):
        for name, path in PATHS.items():
            found[f"train {strategy}, {name}"] = train(_flow(path, strategy=strategy), latents)
    rows = torch.randn(CLASSES, 5)
    for pooled in (False, True):
        features = {"cell_type": ClassFeatures(rows.abs() if pooled else rows, pooled=pooled)}
        name = "sets as labels" if pooled else "numbers as labels"
        found[f"train {name}"] = train(_flow(features=features), latents)
        found[f"train {name}, bf16"] = train(_flow(features=features), latents, torch.bfloat16)
    found |= {
        "train bf16": train(_flow(), latents, torch.bfloat16),
        "train from control cells": train(partial(_from_controls, folder), latents),
        "train distilled": train(_distil, _trajectories()),
        "train with its VAE": train(_joint, cells_table()),
        "train with its VAE, bf16": train(_joint, cells_table(), torch.bfloat16),
        "train adapters": _adapters,
        "train shortly": _short,
        **{f"solver {s}, guidance {w}": _solves(s, w) for s in get_args(Solver) for w in (0.0, 1.0, 2.0)},
        **{f"SDE {d}": _sde(d) for d in DIFFUSIONS},
    }
    return found


def _flow(path: PathConfig | None = None, **dit: Any) -> Callable[[], Any]:
    return lambda: flow_objective(small_dit(**dit), path)


def _distil() -> DistilObjective:
    times = jump_times(2, PathConfig())
    return DistilObjective(small_dit(), times=times, latent_shape=SHAPE, validation=[_trajectories()])


def _trajectories() -> pa.Table:
    return latents_table(shape=(3, *SHAPE))  # noise, and where two jumps end


def _from_controls(folder: Path) -> Any:
    """Half of the cells start at cells of class 0."""
    table, at = latents_table(), folder / "controls"
    at.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_file(at / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    source, order = (
        IpcBlocks(str(at), (("a.arrow", CELLS),), tile=4),
        FeedOrder(np.arange(CELLS), 4, 0, CELLS, 1, CELLS),
    )
    cells = ControlCells.of(torch.randn(5, *SHAPE), {"cell_type": torch.zeros(5, dtype=torch.int64)}, "cell_type")
    starts = ControlStarts(cells, source, order, [0], share=0.5, seed=0)
    draws = FlowDraws(0, order, [0], latent_shape=SHAPE, n_labels=1, controls=starts)
    return flow_objective(small_dit(from_controls=True), draws=draws)


def _joint() -> JointObjective:
    counts = vae_objective(NARROW, genes_per_step=20)
    return JointObjective(
        Joint(counts.module, small_dit(), path=PathConfig()), counts, flow_draws(), weight=0.01,
        n_classes={"cell_type": CLASSES}, label_dropout=0.1, validation=[cells_table()],
    )  # fmt: skip


def _adapters() -> None:
    objective = flow_objective(small_dit())
    add_adapters(objective.module, LoraConfig(rank=2), seed=0, also=["label_cell_type.weight"])
    train(lambda: objective, latents_table())()


def _short() -> None:
    """The many small trainings of predict_error: latents on the CPU, the network on the device."""
    dit = new_dit(DiTConfig(d_model=32, n_layers=1), latent_shape=SHAPE, n_classes={"cell_type": CLASSES}, seed=0)
    training = ShortTraining(3, 4, OptimizerConfig(), EMAConfig())
    ids = {"cell_type": torch.arange(CELLS) % CLASSES}
    state = train_flow(dit.to(CUDA), torch.randn(CELLS, *SHAPE), ids, training, path=PathConfig(), label_dropout=0.1,
                       seed=0)  # fmt: skip
    assert all(bool(x.isfinite().all()) for x in state.values())


def _solves(solver: Solver, guidance: float) -> Any:
    """Return a path: latents of the device are those of the CPU."""

    def path() -> None:
        dit, x0 = small_dit().eval(), torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))
        config = SamplerConfig(solver=solver, steps=3, guidance=guidance, rtol=1e-2, atol=1e-2)
        expected = sample_latents(dit, x0, CONDITIONS, config, PathConfig())
        on = {name: ids.to(CUDA) for name, ids in CONDITIONS.items()}
        found = sample_latents(dit.to(CUDA), x0.to(CUDA), on, config, PathConfig())
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)

    return path


def _sde(diffusion: Any) -> Any:
    def path() -> None:
        dit = small_dit().eval().to(CUDA)
        draw = lambda *_: torch.randn(4, *SHAPE, device=CUDA)  # noqa: E731
        for solver in ("euler", "heun"):
            options = SDEOptions(steps=2, diffusion=diffusion, solver=solver)
            with torch.no_grad():
                velocity = guided_velocity(dit, {}, scale=1.0, path=PathConfig())
                found = solve_sde(velocity, draw(), draw, options, PathConfig())
            assert bool(found.isfinite().all())

    return path
