"""Flows that were distilled: a network that jumps along the trajectories of another flow, its teacher.

A velocity says where a cell moves now, so that a solver needs many of them. A distilled network predicts the mean
velocity of the teacher's trajectory from one time to the next of a grid of 1, 2 or 4 equal jumps,

    u(x_t, t) = (x_s - x_t) / (s - t),     x_t and x_s on one trajectory, s the next time after t,

so that a cell costs one evaluation for each jump (Luhman and Luhman, arXiv 2101.02388, for one; Salimans and Ho, arXiv
2202.00512, for several). The trajectory belongs to the noise that it starts from and is solved once, accurately, with
the teacher's guidance; what the network learns is a function, and the mean square is zero where it is learned. In
training a jump starts where the network's own jumps before it ended, and aims at the trajectory, so that each jump
corrects those before it.

Such a network is no velocity field: it has no likelihood, cannot be run backwards, and takes no other guidance.

Shape letters: b cells, n jumps, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from scldm.flow.config import ControlStart, Distilled, PathConfig, SamplerConfig, shown_guidance
from scldm.flow.guidance import JOINT, ConditionalModel, Field, PerCell, guidance_terms, guided_velocity
from scldm.flow.path import sampling_interval
from scldm.flow.solvers import adams_states, time_batch

DEFAULTS = SamplerConfig()


def jump_times(evaluations: int, path: PathConfig) -> list[float]:
    """Return the times that jumps start and end at, `evaluations` + 1 of them."""
    t0, t1 = sampling_interval(path)
    return [t0 + (t1 - t0) * i / evaluations for i in range(evaluations)] + [t1]


@torch.no_grad()
def teacher_states(
    teacher: ConditionalModel,
    x0: Tensor,
    conditions: Mapping[str, Tensor],
    path: PathConfig,
    *,
    evaluations: int,
    steps: int,
    scale: float | PerCell,
) -> Tensor:
    """Return the teacher's trajectories at the times of jumps, (b, n + 1, m, e): noise first, latents last.

    Args:
        x0: Noise, (b, m, e).
        conditions: Label -> class ids (b,).
        evaluations: Jumps, n.
        steps: Steps of the solver (adams) over all jumps; a multiple of `evaluations`.
        scale: Guidance of all cells, or of each.

    Raises:
        ValueError: `steps` is no multiple of `evaluations`.
    """
    if steps % evaluations:
        raise ValueError(f"steps ({steps}) must be a multiple of evaluations ({evaluations})")
    velocity = guided_velocity(teacher, conditions, scale=scale, path=path, one_time=True)
    each = steps // evaluations
    states = adams_states(velocity, x0, jump_times(steps, path))
    return torch.stack([x0, *(x for i, x in enumerate(states, start=1) if i % each == 0)], dim=1)


def jumps(network: Field, x0: Tensor, times: Sequence[float], *, detach: bool = False) -> Iterator[Tensor]:
    """Yield where each jump ends, (b, m, e) each.

    Args:
        network: (x (b, m, e), t (b,)) -> mean velocity of the jump that starts at t.
        x0: Noise, (b, m, e).
        times: Of the jumps.
        detach: Whether a jump's start has no gradient, as in training.
    """
    x = x0
    for t, t_next in pairwise(times):
        start = x.detach() if detach else x
        x = start + (t_next - t) * network(start, time_batch(start, t))
        yield x


@torch.no_grad()
def sample_distilled(
    dit: Any, x0: Tensor, conditions: Mapping[str, Tensor], distilled: Distilled, path: PathConfig
) -> Tensor:
    """Transport noise x0 (b, m, e) to latents (b, m, e). All labels of a cell are set at once, for every strategy.

    Args:
        dit: A distilled network.
        conditions: Label -> class ids (b,); the null id if a cell has no such label.
    """
    network: Callable[[Tensor, Tensor], Tensor] = dit.at_one_time(conditions)
    x = x0
    for end in jumps(network, x0, jump_times(distilled.evaluations, path)):
        x = end
    return x


def jump_losses(
    model: Callable[..., Tensor],
    states: Tensor,
    conditions: Mapping[str, Tensor],
    times: Sequence[float],
) -> Tensor:
    """Return for each cell the mean square by which its jumps miss the teacher's trajectory, (b, n).

    Args:
        model: (x (b, m, e), t (b,), conditions) -> mean velocity of the jump that starts at t.
        states: The teacher's trajectories, (b, n + 1, m, e).
        conditions: Label -> class ids (b,).
        times: Of the jumps, n + 1.
    """
    ends = jumps(lambda x, t: model(x, t, conditions), states[:, 0], times, detach=True)
    misses = [(x - states[:, i]).square().flatten(1).mean(1) for i, x in enumerate(ends, start=1)]
    return torch.stack(misses, dim=1)


def teacher_problems(
    guidance: Mapping[str, float] | float,
    *,
    path: PathConfig,
    labels: Sequence[str],
    strategy: Literal["joint", "mutually_exclusive"],
    label_dropout: float,
    start: ControlStart | None,
    distilled: Distilled | None = None,
) -> list[str]:
    """Return why a flow cannot be distilled with some guidance, and what to do.

    Args:
        path: Path and prediction of the flow.
        labels: Its labels.
        strategy: How it combines them.
        label_dropout: Fraction of cells that it was trained on without labels.
        start: What it was trained from beside noise.
        distilled: How it was distilled itself.
    """
    if problem := whole_flow_problem(distilled, "distil"):
        return [problem]
    problems = []
    if path.prediction != "velocity":
        problems.append(
            f"distil needs a flow that predicts a velocity, and this one predicts a {path.prediction}; train one with "
            "train_flow.flow.prediction=velocity"
        )
    if start is not None and start.share == 1:
        problems.append(
            f"distil needs a flow that was trained from noise, and this one was trained from control cells "
            f"({start.label} {start.control}) only; train one with train_flow.start.share below 1"
        )
    unknown = sorted(set(guidance) - {JOINT, *labels}) if isinstance(guidance, Mapping) else []
    if unknown:
        problems.append(f"distil.guidance: the flow knows no label {', '.join(unknown)}; it knows {', '.join(labels)}")
        return problems
    try:
        terms = guidance_terms(labels, guidance, strategy=strategy)
    except ValueError as error:
        return [*problems, f"distil.{error}"]
    if label_dropout == 0 and labels and any(term.labels != tuple(labels) for term in terms if strategy == "joint"):
        problems.append(
            f"distil.guidance ({shown_guidance(guidance)}) needs a field without labels, and the flow was trained "
            "without one; set distil.guidance=1, or train one with train_flow.model.label_dropout above 0"
        )
    return problems


# ---- what a distilled flow cannot do -------------------------------------------------------------------------------
def sampler_problems(distilled: Distilled, sampler: SamplerConfig, where: str = "sampler") -> list[str]:
    """Return settings of a sampler that a distilled flow cannot honour.

    Solver, steps and tolerances at their defaults stand for the jumps that the flow was trained to make.
    """
    n, problems = distilled.evaluations, []
    own = f"this flow was distilled to {n} evaluation{'s' if n > 1 else ''}"
    if (sampler.solver, sampler.steps) not in ((DEFAULTS.solver, DEFAULTS.steps), ("euler", n)):
        problems.append(
            f"{where}.solver ({sampler.solver}, {sampler.steps} steps): {own}, and solves no equation; leave solver "
            "and steps out, or generate with the flow that it was distilled from"
        )
    for name in ("rtol", "atol"):
        if getattr(sampler, name) != getattr(DEFAULTS, name):
            problems.append(f"{where}.{name} ({getattr(sampler, name):g}) is of dopri5, and {own}; leave it out")
    if not _same(sampler.guidance, distilled.guidance):
        problems.append(f"{where}.guidance ({shown_guidance(sampler.guidance)}): {guidance_remedy(distilled)}")
    return problems


def guidance_remedy(distilled: Distilled) -> str:
    """Return which guidance a distilled flow has, and how to have another."""
    return (
        f"this flow was distilled with guidance {shown_guidance(distilled.guidance)}, which is in its weights; ask "
        "for that one, generate with the flow that it was distilled from, or distil again with distil.guidance"
    )


def whole_flow_problem(distilled: Distilled | None, what: str) -> str | None:
    """Return why a distilled flow cannot do what needs a velocity field, and what to do; None if the flow is none.

    Args:
        what: What is asked for, in words, such as `start (latents)`.
    """
    if distilled is None:
        return None
    return (
        f"{what} needs the velocity field of a flow, and this one was distilled: it only jumps from noise to latents; "
        "name the flow that it was distilled from"
    )


def _same(a: Mapping[str, float] | float, b: Mapping[str, float] | float) -> bool:
    """Return whether two guidances are the same, one number being that of every label."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return {k: v for k, v in a.items() if v} == {k: v for k, v in b.items() if v}
    if isinstance(a, Mapping) or isinstance(b, Mapping):
        table, one = (a, b) if isinstance(a, Mapping) else (b, a)
        return all(w == one for w in table.values())  # type: ignore[union-attr]
    return a == b
