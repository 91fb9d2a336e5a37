"""ODE solvers for x' = v(x, t): explicit Runge-Kutta, with fixed steps or adaptive, and Adams-Bashforth.

The velocity takes x (b, ...) and t (b,). Fixed-step solvers never read a tensor on the host, so that a GPU never waits.
dopri5 picks one step for the whole batch from the root mean square of the scaled error, as torchdiffeq does, and reads
one number per step; a cell's result therefore depends, within the tolerances, on the batch it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from scldm.flow.config import Solver

ADAMS_ORDER = 3
MAX_STEPS = 10_000  # dopri5, counting rejected steps
MIN_STEP = 1e-10  # dopri5: far below the resolution of fp32, so that only a singular field reaches it
Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """End of a trajectory."""

    x: Tensor  # (b, ...)
    nfe: int  # evaluations of the velocity


@dataclass(frozen=True)
class Tableau:
    """Coefficients of an explicit Runge-Kutta method.

    Stage i is at t + c_i h and x + h sum_j a_ij k_j; the step is h sum_i b_i k_i.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


TABLEAUX: dict[str, Tableau] = {
    "euler": Tableau(c=(0,), a=((),), b=(1,)),
    "midpoint": Tableau(c=(0, 1 / 2), a=((), (1 / 2,)), b=(0, 1)),
    "heun": Tableau(c=(0, 1), a=((), (1,)), b=(1 / 2, 1 / 2)),
    "heun3": Tableau(c=(0, 1 / 3, 2 / 3), a=((), (1 / 3,), (0, 2 / 3)), b=(1 / 4, 0, 3 / 4)),
    # Kutta's 3/8 rule, which is what torchdiffeq calls rk4.
    "rk4": Tableau(c=(0, 1 / 3, 2 / 3, 1), a=((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), b=(1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
DOPRI5 = Tableau(
    c=(0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
)
# Fifth order minus fourth, and the value in the middle of a step (Shampine 1986).
DOPRI5_ERROR = (
    35 / 384 - 1951 / 21600,
    0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)
DOPRI5_MIDDLE = (
    6025192743 / 30085553152 / 2,
    0,
    51252292925 / 65400821598 / 2,
    -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2,
    -1776094331 / 19743644256 / 2,
    11237099 / 235043384 / 2,
)


def solve_ode(
    velocity: Velocity,
    x0: Tensor,
    times: Sequence[float],
    *,
    solver: Solver,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Solution:
    """Integrate the velocity from x0 at times[0] to times[-1].

    Args:
        velocity: Field, (x (b, ...), t (b,)) -> (b, ...).
        x0: Start, (b, ...).
        times: Increasing or decreasing. A fixed-step solver steps between them; dopri5 uses the ends only.
        solver: Name of the solver.
        rtol: Relative tolerance of dopri5.
        atol: Absolute tolerance of dopri5.
    """
    if len(times) < 2 or times[0] == times[-1]:
        raise ValueError(f"times must hold a start and another end; got {list(times)}")
    if solver == "dopri5":
        return solve_dopri5(velocity, x0, times[0], times[-1], rtol=rtol, atol=atol)
    if solver == "adams":
        return solve_adams(velocity, x0, times)
    tableau, x = TABLEAUX[solver], x0
    for t, t_next in pairwise(times):
        stages = evaluate_stages(velocity, x, t, t_next, tableau)
        x = x + (t_next - t) * weighted_sum(tableau.b, stages)
    return Solution(x=x, nfe=len(tableau.b) * (len(times) - 1))


# ---- fixed steps ---------------------------------------------------------------------------------------------------
def time_batch(x: Tensor, t: float) -> Tensor:
    """Return t as (b,) in at least fp32: bfloat16 cannot tell 0.999 from 1."""
    return torch.full(x.shape[:1], t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def evaluate_stages(
    velocity: Velocity, x: Tensor, t: float, t_next: float, tableau: Tableau, *, first: Tensor | None = None
) -> list[Tensor]:
    """Return the slopes k_i (b, ...) of a step from t to t_next; `first` is k_0 if already known."""
    stages = [velocity(x, time_batch(x, t)) if first is None else first]
    for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
        # The end exactly: t + (t_next - t) may round to a time past it.
        stage_t = t_next if c == 1 else t + c * (t_next - t)
        stages.append(velocity(x + (t_next - t) * weighted_sum(row, stages), time_batch(x, stage_t)))
    return stages


def weighted_sum(weights: Sequence[float], stages: Sequence[Tensor]) -> Tensor:
    """Return sum_i weights_i stages_i, leaving out zero weights."""
    terms = [stage if weight == 1 else weight * stage for weight, stage in zip(weights, stages, strict=True) if weight]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def solve_adams(velocity: Velocity, x0: Tensor, times: Sequence[float], *, order: int = ADAMS_ORDER) -> Solution:
    """Integrate by Adams-Bashforth from x0 (b, ...) at times[0] to times[-1], reusing the slopes of earlier steps.

    A step costs one evaluation, and the first two more: it is Heun's of third order. The polynomial goes through the
    last `order` slopes, or fewer at the start. Steps need not be equal.
    """
    x = x0
    for state in adams_states(velocity, x0, times, order=order):
        x = state  # only the last is kept
    return Solution(x=x, nfe=len(times) - 1 + 2)


def adams_states(
    velocity: Velocity, x0: Tensor, times: Sequence[float], *, order: int = ADAMS_ORDER
) -> Iterator[Tensor]:
    """Yield the states (b, ...) at times[1:], as `solve_adams` passes through them."""
    x = x0
    slopes: list[Tensor] = []
    known: list[float] = []
    for i, (t, t_next) in enumerate(pairwise(times)):
        if i == 0:
            stages = evaluate_stages(velocity, x, t, t_next, TABLEAUX["heun3"])
            step = (t_next - t) * weighted_sum(TABLEAUX["heun3"].b, stages)
            slopes, known = [stages[0]], [t]
        else:
            slopes, known = [*slopes, velocity(x, time_batch(x, t))][-order:], [*known, t][-order:]
            step = (t_next - t) * weighted_sum(_adams_weights(known, t, t_next), slopes)
        x = x + step
        yield x


def _adams_weights(known: Sequence[float], t: float, t_next: float) -> tuple[float, ...]:
    """Return the weights of the slopes at times `known`: the mean of their polynomial over the step t to t_next."""
    u = (np.array(known) - t) / (t_next - t)
    powers = np.arange(len(known))
    return tuple(np.linalg.solve(u[None] ** powers[:, None], 1 / (powers + 1)).tolist())


# ---- adaptive steps ------------------------------------------------------------------------------------------------
def solve_dopri5(
    velocity: Velocity, x0: Tensor, t0: float, t1: float, *, rtol: float, atol: float, overshoot: bool = False
) -> Solution:
    """Integrate by Dormand-Prince 5(4) from x0 (b, ...) at t0 to t1, with Hairer's first step and step control.

    With `overshoot` the last step goes past t1 and the end is interpolated, as in torchdiffeq (hence upstream); without
    it the last step ends at t1, so that the field is never evaluated outside the interval.
    """
    for step in _dopri5_steps(velocity, x0, t0, t1, rtol=rtol, atol=atol, overshoot=overshoot):
        last = step  # only the last is kept: a step holds seven slopes
    return Solution(x=last.at(t1) if overshoot else last.x_next, nfe=last.nfe)


def dopri5_states(
    velocity: Velocity, x0: Tensor, times: Sequence[float], *, rtol: float, atol: float
) -> tuple[list[Tensor], int]:
    """Return the states at `times`, the first of which is x0's, and the number of evaluations.

    Overshoots as torchdiffeq does. States between steps are interpolated, so that more of them change neither steps
    nor cost.
    """
    states, wanted, sign, nfe = [x0], list(times[1:]), math.copysign(1.0, times[-1] - times[0]), 0
    for step in _dopri5_steps(velocity, x0, times[0], times[-1], rtol=rtol, atol=atol, overshoot=True):
        while wanted and sign * (step.t_next - wanted[0]) >= 0:
            states.append(step.at(wanted.pop(0)))
        nfe = step.nfe
    return states, nfe


@dataclass(frozen=True)
class _Step:
    """An accepted step of dopri5."""

    t: float
    t_next: float
    x: Tensor
    x_next: Tensor
    stages: list[Tensor]
    nfe: int  # evaluations so far

    def at(self, time: float) -> Tensor:
        """Interpolate the state inside the step."""
        return _interpolate(self.x, self.x_next, self.stages, self.t, self.t_next, time)


def _dopri5_steps(
    velocity: Velocity, x0: Tensor, t0: float, t1: float, *, rtol: float, atol: float, overshoot: bool
) -> Iterator[_Step]:
    """Yield the accepted steps from t0 up to the one that reaches t1."""
    x, t, sign = x0, t0, math.copysign(1.0, t1 - t0)
    first = velocity(x, time_batch(x, t))
    size, nfe = _first_step(velocity, x, t, first, sign=sign, rtol=rtol, atol=atol), 2
    for _ in range(MAX_STEPS):
        ends = not overshoot and size >= abs(t1 - t)
        t_next = t1 if ends else t + sign * size
        if not ends and size < MIN_STEP * max(1.0, abs(t)):
            raise RuntimeError(f"dopri5: the step underflows at t = {t:.6g}; the field is singular or not finite there")
        stages = evaluate_stages(velocity, x, t, t_next, DOPRI5, first=first)
        nfe += len(stages) - 1
        x_next = x + (t_next - t) * weighted_sum(DOPRI5.b, stages)
        error = (t_next - t) * weighted_sum(DOPRI5_ERROR, stages)
        ratio = float(_rms(error / (atol + rtol * torch.maximum(x.abs(), x_next.abs()))))  # the one host read per step
        size = abs(t_next - t) * _step_factor(ratio)
        if ratio <= 1:
            yield _Step(t, t_next, x, x_next, stages, nfe)
            if ends or sign * (t_next - t1) >= 0:
                return
            x, t, first = x_next, t_next, stages[-1]  # the last stage is the first of the next step
    raise RuntimeError(f"dopri5: no end after {MAX_STEPS} steps, at t = {t:.6g}; rtol {rtol}, atol {atol}")


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _first_step(
    velocity: Velocity, x: Tensor, t: float, first: Tensor, *, sign: float, rtol: float, atol: float
) -> float:
    """Return the first step size by Hairer, Norsett and Wanner (1993), II.4, with torchdiffeq's exponent 1/5."""
    scale = atol + rtol * x.abs()
    d0, d1 = float(_rms(x / scale)), float(_rms(first / scale))
    if not math.isfinite(d0 + d1):
        raise RuntimeError(f"dopri5: the start or the field is not finite at t = {t:.6g}")
    h0 = 1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1
    second = velocity(x + sign * h0 * first, time_batch(x, t + sign * h0))
    d2 = float(_rms((second - first) / scale)) / h0
    h1 = max(1e-6, 1e-3 * h0) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** (1 / 5)
    return min(100 * h0, h1)


def _step_factor(ratio: float) -> float:
    if not math.isfinite(ratio):
        return 0.2
    if ratio == 0:
        return 10.0
    return min(10.0, max(0.9 * ratio ** (-1 / 5), 1.0 if ratio < 1 else 0.2))


def _interpolate(x: Tensor, x_next: Tensor, stages: Sequence[Tensor], t: float, t_next: float, at: float) -> Tensor:
    """Evaluate the fourth-order polynomial through the ends, their slopes and the middle of a step."""
    h, u = t_next - t, (at - t) / (t_next - t)
    middle, f0, f1 = x + h * weighted_sum(DOPRI5_MIDDLE, stages), stages[0], stages[-1]
    quartic = 2 * h * (f1 - f0) - 8 * (x_next + x) + 16 * middle
    cubic = h * (5 * f0 - 3 * f1) + 18 * x + 14 * x_next - 32 * middle
    square = h * (f1 - 4 * f0) - 11 * x - 5 * x_next + 16 * middle
    return x + u * (h * f0 + u * (square + u * (cubic + u * quartic)))
