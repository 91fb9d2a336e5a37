"""Explicit Runge-Kutta: tableaux and the evaluation of their stages, shared by the solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """The end of a trajectory."""

    x: Tensor  # (b, ...)
    nfe: int  # evaluations of the velocity


@dataclass(frozen=True)
class Tableau:
    """Explicit Runge-Kutta: stage i is at t + c_i h and x + h sum_j a_ij k_j; the step is h sum_i b_i k_i."""

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


def times_of(x: Tensor, t: float) -> Tensor:
    """(b,) in at least fp32: bfloat16 cannot tell 0.999 from 1."""
    return torch.full(x.shape[:1], t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def stages_of(
    velocity: Velocity, x: Tensor, t: float, t_next: float, tableau: Tableau, *, first: Tensor | None = None
) -> list[Tensor]:
    stages = [velocity(x, times_of(x, t)) if first is None else first]
    for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
        # The end exactly: t + (t_next - t) may round to a time past it.
        stage_t = t_next if c == 1 else t + c * (t_next - t)
        stages.append(velocity(x + (t_next - t) * combined(row, stages), times_of(x, stage_t)))
    return stages


def combined(weights: Sequence[float], stages: Sequence[Tensor]) -> Tensor:
    terms = [stage if weight == 1 else weight * stage for weight, stage in zip(weights, stages, strict=True) if weight]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
