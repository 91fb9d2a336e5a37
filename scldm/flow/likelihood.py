"""Log-likelihood of latents under the flow, by the ODE run from data (t = 1) back to noise (t = 0).

log p(x1) = log N(x0) - integral of div v. The divergence is estimated by Hutchinson's trick with a probe of mean 0 and
covariance I, which is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scldm.flow.config import Solver
from scldm.flow.solvers import Velocity, solve_ode


@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihood of each cell, and the noise that the ODE maps it to."""

    log_prob: Tensor  # (b,), nats
    x0: Tensor  # (b, ...)
    nfe: int


def rademacher(shape: Sequence[int], *, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw random signs +1 and -1: the probe of least variance."""
    return (torch.randint(2, tuple(shape), generator=generator, device=generator.device) * 2 - 1).float().to(device)


def standard_normal_log_prob(x: Tensor) -> Tensor:
    """Return the log density of each row of x (b, ...) under a standard normal, summed over its values: (b,)."""
    x = x.flatten(1)
    return -0.5 * (x.square().sum(dim=1) + x.shape[1] * math.log(2 * math.pi))


def log_likelihood(
    velocity: Velocity,
    x1: Tensor,
    times: Sequence[float],
    *,
    probe: Tensor | Callable[[int], Tensor],
    solver: Solver,
    rtol: float = 1e-3,
    atol: float = 1e-6,
) -> LogLikelihood:
    """Return the log-likelihood of x1 (b, ...) under the flow of a velocity field.

    Args:
        velocity: Field, differentiable in x.
        x1: Data.
        times: From 1 down to 0, as for `solve_ode`.
        probe: Shaped as x1. One probe for the whole solve, which an adaptive solver needs to see a smooth field; or a
            function from the number of the evaluation to its probe.
        solver: ODE solver.
        rtol: Relative tolerance of dopri5.
        atol: Absolute tolerance of dopri5.
    """
    n_evaluations = 0

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        nonlocal n_evaluations
        eps = probe if isinstance(probe, Tensor) else probe(n_evaluations)
        n_evaluations += 1
        x = state[:, :-1].reshape(x1.shape)
        v, divergence = _velocity_and_divergence(velocity, x, t, eps)
        return torch.cat([v.flatten(1), divergence.unsqueeze(1)], dim=1)

    state = torch.cat([x1.flatten(1), x1.new_zeros(len(x1), 1)], dim=1)  # (b, m e + 1)
    solution = solve_ode(augmented, state, times, solver=solver, rtol=rtol, atol=atol)
    x0, integral = solution.x[:, :-1].reshape(x1.shape), solution.x[:, -1]
    return LogLikelihood(log_prob=standard_normal_log_prob(x0) + integral, x0=x0, nfe=solution.nfe)


def _velocity_and_divergence(velocity: Velocity, x: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = velocity(x, t)
        (grad,) = torch.autograd.grad((v * eps).sum(), x)
    return v.detach(), (grad * eps).flatten(1).sum(dim=1)
