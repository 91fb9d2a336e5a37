"""Sample by the stochastic differential equation of a flow: dx = (v + D score) dt + sqrt(2 D) dW.

Any diffusion D(t) >= 0 keeps the marginals of the path (Ma et al. 2024). Noise x0 is at t = 0, data at t = 1; x is
(b, ...). The noise of every step is passed in, so that a cell's result does not depend on which worker computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scldm.flow.config import PathConfig
from scldm.flow.guidance import Field
from scldm.flow.objective import to_score, to_velocity
from scldm.flow.path import PATHS, times_like

Diffusion = Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"]


@dataclass(frozen=True)
class SDEOptions:
    """Settings of the SDE sampler."""

    steps: int = 249  # stochastic steps, not counting the last, noiseless one
    solver: Literal["euler", "heun"] = "euler"
    diffusion: Diffusion = "sbdm"
    norm: float = 1.0  # factor on D; inside the cosine for `decreasing`
    last_step: Literal["mean", "euler", "tweedie", "none"] = "mean"  # noiseless end: SDE drift, ODE, denoised, nothing
    last_step_size: float = 0.04
    eps: float = 1e-3  # distance from the ends where a coefficient is infinite


def diffusion(t: Tensor, options: SDEOptions, config: PathConfig) -> Tensor:
    """Return the diffusion D at times t (any shape)."""
    path, norm = PATHS[config.path], options.norm
    if options.diffusion == "sbdm":
        return norm * path.score_weight(t)
    if options.diffusion == "sigma":
        return norm * path.sigma(t)
    if options.diffusion == "linear":
        return norm * (1 - t)
    if options.diffusion == "decreasing":
        return 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2
    if options.diffusion == "increasing_decreasing":
        return norm * torch.sin(math.pi * t) ** 2
    return torch.full_like(t, norm)


def sde_interval(options: SDEOptions, config: PathConfig) -> tuple[float, float]:
    """Return the times that the stochastic steps cross; the last step covers the rest."""
    t1 = 1 - (options.eps if options.last_step == "none" or options.last_step_size == 0 else options.last_step_size)
    singular_start = config.path != "vp" and (options.diffusion == "sbdm" or config.prediction != "velocity")
    return (options.eps if singular_start else 0.0), t1


@torch.no_grad()
def solve_sde(
    predict: Field, x0: Tensor, noise: Callable[[int], Tensor], options: SDEOptions, config: PathConfig
) -> Tensor:
    """Transport noise x0 to data by `options.steps` stochastic steps and a last one.

    Args:
        predict: The network's (guided) prediction, (x (b, ...), t (b,)) -> (b, ...).
        x0: Start, (b, ...).
        noise: Function from the number of a step to its standard normal draws, shaped as x0.
        options: Settings of the sampler.
        config: Path and prediction.
    """
    x = x0
    for state in sde_states(predict, x0, noise, options, config):
        x = state
    return last_step(predict, x, options, config)


@torch.no_grad()
def sde_states(
    predict: Field, x0: Tensor, noise: Callable[[int], Tensor], options: SDEOptions, config: PathConfig
) -> Iterator[Tensor]:
    """Yield the state after each stochastic step, before the last, noiseless one. Arguments as in `solve_sde`."""
    t0, t1 = sde_interval(options, config)
    dt, x = (t1 - t0) / options.steps, x0
    for step in range(options.steps):
        t = x.new_full(x.shape[:1], t0 + step * dt)
        kick = torch.sqrt(2 * dt * diffusion(times_like(t, x), options, config)) * noise(step)
        if options.solver == "euler":
            x = x + dt * _drift(predict, x, t, options, config) + kick
        else:
            x = x + kick
            first = _drift(predict, x, t, options, config)
            x = x + dt / 2 * (first + _drift(predict, x + dt * first, t + dt, options, config))
        yield x


def _drift(predict: Field, x: Tensor, t: Tensor, options: SDEOptions, config: PathConfig) -> Tensor:
    prediction = predict(x, t)
    score = to_score(prediction, x, t, config)
    return to_velocity(prediction, x, t, config) + diffusion(times_like(t, x), options, config) * score


@torch.no_grad()
def last_step(predict: Field, x: Tensor, options: SDEOptions, config: PathConfig) -> Tensor:
    """Take the noiseless step from the state after the stochastic steps to data."""
    if options.last_step == "none":
        return x
    t = x.new_full(x.shape[:1], sde_interval(options, config)[1])
    if options.last_step == "mean":
        return x + options.last_step_size * _drift(predict, x, t, options, config)
    prediction = predict(x, t)
    if options.last_step == "euler":
        return x + options.last_step_size * to_velocity(prediction, x, t, config)
    path, times = PATHS[config.path], times_like(t, x)
    return (x + path.sigma(times) ** 2 * to_score(prediction, x, t, config)) / path.alpha(times)
