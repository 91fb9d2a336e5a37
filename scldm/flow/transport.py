"""Flows that start at control cells: which control a training cell starts from, and the field that carries controls.

x0 of such a cell are the latents of a control cell with the same other labels, in the place of noise. Cells of one
treatment are matched to as many controls, drawn at random, by the assignment with the smallest sum of squared distances
(minibatch optimal transport: Tong et al., arXiv 2302.00482; CellFlow trains so). Treatments are matched one at a time:
together, each would take the controls that resemble it, and all controls are carried when cells are predicted.

Many cells at a time are worth it: for Gaussians of 8 dimensions in 256, shifted, the mean squared distance of a cell
from its control is 0.77 of that of random pairs with 4 cells at a time, 0.54 with 16, 0.38 with 64 and 0.27 with 256.

Shape letters: n cells, p control cells, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from scldm.flow.config import ControlStart, PathConfig, SamplerConfig
from scldm.flow.guidance import JOINT, Field, PerCell
from scldm.flow.sampler import sample_latents

MATCHED = 256  # cells that are matched together at most: time grows as the cube
NOT_A_CONTROL = -1
Group = tuple[int, ...]  # class ids of the other labels
Start = Literal["noise", "latents", "control"]


@dataclass(frozen=True)
class ControlCells:
    """Control cells that training cells can start at."""

    latents: Tensor  # (p, m, e)
    rows: Mapping[Group, Tensor]  # rows of `latents`, int64, by the class ids of the other labels
    label: str  # whose control class they have
    others: tuple[str, ...]  # names of the other labels, in the order of a group's ids

    @classmethod
    def of(cls, latents: Tensor, conditions: Mapping[str, Tensor], label: str) -> ControlCells:
        """Group control cells by their other labels.

        Args:
            latents: Of control cells only, (p, m, e).
            conditions: Label -> class ids (p,).
            label: The label whose control class they have.
        """
        others = tuple(sorted(name for name in conditions if name != label))
        found: dict[Group, list[int]] = {}
        for row, group in enumerate(_groups(conditions, others, len(latents))):
            found.setdefault(group, []).append(row)
        return cls(latents, {group: torch.tensor(rows) for group, rows in found.items()}, label, others)

    def match(
        self, latents: Tensor, conditions: Mapping[str, Tensor], chosen: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the control cell that each cell starts at, int64 (n,): a row of `latents`, or -1 for noise.

        Args:
            latents: Of the cells, (n, m, e), on the CPU.
            conditions: Label -> class ids (n,).
            chosen: Which cells start at a control cell if their group has any, bool (n,).
            generator: Source of the draws of control cells, on the CPU.
        """
        start = torch.full((len(latents),), NOT_A_CONTROL, dtype=torch.int64)
        together: dict[tuple[Group, int], list[int]] = {}
        groups, treatments = _groups(conditions, self.others, len(latents)), conditions[self.label].tolist()
        for cell in chosen.nonzero().squeeze(1).tolist():
            if groups[cell] in self.rows:
                together.setdefault((groups[cell], treatments[cell]), []).append(cell)
        for (group, _), cells in sorted(together.items()):  # in an order of their own: the draws follow it
            for at in range(0, len(cells), MATCHED):
                part = torch.tensor(cells[at : at + MATCHED])
                drawn = self._draw(group, len(part), generator)
                start[part] = drawn[nearest_assignment(latents[part], self.latents[drawn])]
        return start

    def _draw(self, group: Group, n: int, generator: torch.Generator) -> Tensor:
        """Return n rows of a group: each as often as any other, up to one."""
        rows = self.rows[group]
        whole, rest = divmod(n, len(rows))
        return torch.cat([rows.repeat(whole), rows[torch.randperm(len(rows), generator=generator)[:rest]]])


def nearest_assignment(cells: Tensor, controls: Tensor) -> Tensor:
    """Return the control of each cell, (n,): a permutation with the smallest sum of squared distances.

    Args:
        cells: Latents, (n, m, e).
        controls: As many, of the same shape.
    """
    a, b = (x.flatten(1).double().numpy() for x in (cells, controls))
    _, columns = linear_sum_assignment(-(a @ b.T))  # squared norms add the same to every permutation
    return torch.from_numpy(np.asarray(columns, dtype=np.int64))


def _groups(conditions: Mapping[str, Tensor], others: Sequence[str], n: int) -> list[Group]:
    if not others:
        return [()] * n
    return [tuple(ids) for ids in torch.stack([conditions[name] for name in others], dim=1).tolist()]


class FromControls:
    """The field of a network that starts at control cells, for guidance and solvers.

    Args:
        dit: A network with `from_controls`.
    """

    def __init__(self, dit: Any):
        self.dit = dit

    @cached_property
    def n_classes(self) -> dict[str, int]:
        """Label -> number of classes."""
        return dict(self.dit.n_classes)

    @property
    def strategy(self) -> Literal["joint", "mutually_exclusive"]:
        """How labels are combined."""
        strategy: Literal["joint", "mutually_exclusive"] = self.dit.strategy
        return strategy

    def __call__(self, x_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        every: Tensor = self.dit(x_t, t, conditions, torch.ones(len(t), dtype=torch.bool, device=t.device))
        return every

    def at_one_time(self, conditions: Mapping[str, Tensor]) -> Field:
        """Return the field with its conditions fixed, for times (b,) that are all equal."""
        field: Field = self.dit.at_one_time(conditions, from_controls=True)
        return field


@torch.no_grad()
def sample_through_controls(
    dit: Any,
    x0: Tensor,
    conditions: Mapping[str, Tensor],
    config: SamplerConfig,
    path: PathConfig,
    *,
    label: str,
    control: int,
    scale: PerCell,
) -> Tensor:
    """Transport noise x0 (b, m, e) to latents (b, m, e) by way of control cells.

    Control cells of the same other labels are made from the noise, without guidance, and carried to the labels. Cells
    of the control class, and cells without that label, are made from the noise alone.

    Args:
        dit: A network with both fields.
        conditions: Label -> class ids (b,).
        config: Solver and steps, of both ways.
        label: The label of the treatment.
        control: Id of its control class.
        scale: Guidance scales of each cell.
    """
    own = conditions[label]
    carried = (own != control) & (own != dit.n_classes[label])
    unguided = {k: float(k == JOINT or dit.strategy != "joint") for k in scale}
    first = {k: torch.where(carried, torch.full_like(w, unguided[k]), w) for k, w in scale.items()}
    controls = {**conditions, label: torch.where(carried, control, own)}
    z = sample_latents(dit, x0, controls, config, path, scale=first)
    if not carried.any():
        return z
    moved = sample_latents(FromControls(dit), z, conditions, config, path, scale=scale)
    return torch.where(carried.view(-1, *[1] * (z.ndim - 1)), moved, z)


def start_problem(start: ControlStart | None, wanted: Start, *, instead: Start = "latents") -> str | None:
    """Return why cells cannot be made from a start by a flow, and what to do; None if they can.

    Args:
        start: What the flow was trained from beside noise; None: from noise only.
        wanted: noise, latents (to noise and back), or control.
        instead: What to take in the place of control.
    """
    if wanted == "control" and start is None:
        return (
            "start (control) needs a flow that was trained from control cells, and this one was trained from noise "
            f"only; set start={instead}, or train a flow with train_flow.start={{control: {{LABEL: CLASS}}}}"
        )
    if wanted != "control" and start is not None and start.share == 1:
        return (
            f"start ({wanted}) needs a flow that was trained from noise, and this one was trained from control cells "
            f"({start.label} {start.control}) only, with train_flow.start.share=1; carry control cells in a perturb "
            "job with start=control, or train with a share below 1"
        )
    return None


def generation_start_problem(start: ControlStart | None, wanted: Literal["noise", "control"]) -> str | None:
    """Return why a flow cannot generate cells from a start; those that are carried are made from noise first."""
    return start_problem(start, wanted, instead="noise") or start_problem(start, "noise")
