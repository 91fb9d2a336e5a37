"""Draw latents from noise: guidance, prediction and solver put together.

Shape letters: b cells, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scldm.flow.config import PathConfig, SamplerConfig
from scldm.flow.guidance import ConditionalModel, PerCell, guided_velocity
from scldm.flow.path import sampling_interval
from scldm.flow.solvers import solve_ode


def time_grid(config: SamplerConfig, path: PathConfig) -> list[float]:
    """Return `steps` equal steps over the sampling interval of the path."""
    t0, t1 = sampling_interval(path)
    return [t0 + (t1 - t0) * i / config.steps for i in range(config.steps)] + [t1]


@torch.no_grad()
def sample_latents(
    model: ConditionalModel,
    x0: Tensor,
    conditions: Mapping[str, Tensor],
    config: SamplerConfig,
    path: PathConfig,
    times: Sequence[float] | None = None,
    scale: PerCell | None = None,
) -> Tensor:
    """Transport noise x0 (b, m, e) to latents (b, m, e).

    Args:
        model: Network with the weights to sample from; the caller has loaded those of `config.weights`.
        x0: Noise. The same noise, conditions and configuration give the same latents.
        conditions: Label to ids (b,). An absent label is null.
        config: Solver, steps, tolerances and guidance.
        path: Path and prediction that the network was trained with.
        times: Times to step through; equal steps (`time_grid`) if None.
        scale: Guidance scale of each cell; the configuration's if None.
    """
    for label, ids in conditions.items():
        if ids.shape != x0.shape[:1]:
            raise ValueError(f"conditions[{label!r}] must have one id per cell, ({len(x0)},); got {tuple(ids.shape)}")
    guidance = config.guidance if scale is None else scale
    velocity = guided_velocity(model, conditions, scale=guidance, path=path, one_time=True)
    grid = time_grid(config, path) if times is None else times
    return solve_ode(velocity, x0, grid, solver=config.solver, rtol=config.rtol, atol=config.atol).x
