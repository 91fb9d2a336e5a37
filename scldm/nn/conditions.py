"""Label ids of cells: checks, and the label dropout that makes guidance possible.

`conditions` maps a label to ids (b,); id n_classes[label] is the null class. A label that is absent from the mapping is
null for every cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Strategy = Literal["joint", "mutually_exclusive"]
JointDropout = Literal["all_then_each", "all", "each"]


def check_labels(conditions: Mapping[str, Tensor], n_classes: Mapping[str, int]) -> None:
    """Raise if a label is unknown. Looks at names only: no host sync."""
    unknown = sorted(set(conditions) - set(n_classes))
    if unknown:
        raise ValueError(f"conditions: unknown labels {unknown}; the model knows {sorted(n_classes)}")


def validate_ids(conditions: Mapping[str, Tensor], n_classes: Mapping[str, int], *, strategy: Strategy) -> None:
    """Raise if a label is unknown, an id out of range, or several exclusive labels are set for one cell.

    Reads the ids on the host: call it where a table of conditions comes in, not in a training step.
    """
    check_labels(conditions, n_classes)
    for label, ids in conditions.items():
        n = n_classes[label]
        if ids.dtype not in (torch.int32, torch.int64) or ids.ndim != 1:
            raise ValueError(f"conditions[{label!r}] must be integer ids (b,); got {ids.dtype} {tuple(ids.shape)}")
        bad = ids[(ids < 0) | (ids > n)]
        if len(bad):
            raise ValueError(f"conditions[{label!r}] holds id {int(bad[0])}; allowed are 0..{n - 1}, and {n} for null")
    if strategy == "mutually_exclusive" and conditions:
        n_set = sum((ids != n_classes[label]).int() for label, ids in conditions.items())
        if int(n_set.max()) > 1:
            cell = int(n_set.argmax())
            raise ValueError(f"conditions of cell {cell} set {int(n_set[cell])} labels; mutually_exclusive allows one")


def drop_labels(
    conditions: Mapping[str, Tensor],
    n_classes: Mapping[str, int],
    *,
    p: float,
    generator: torch.Generator,
    strategy: Strategy,
    joint_dropout: JointDropout = "all_then_each",
) -> dict[str, Tensor]:
    """Replace ids by the null class at random, per cell.

    mutually_exclusive: one of the labels that a cell has is kept, drawn evenly; with probability p that one goes too.
    joint, by `joint_dropout`:
        all_then_each: with probability p all labels of a cell go; else each goes with probability p on its own, so
            that the model also learns partial conditions.
        all: with probability p all labels of a cell go, else none (upstream).
        each: each label goes with probability p on its own.

    Args:
        conditions: Label to ids (b,).
        n_classes: Label to its number of classes, which is the null id.
        p: Probability in [0, 1].
        generator: Source of randomness; its device is where the draws are made.
    """
    check_labels(conditions, n_classes)
    if not 0 <= p <= 1:
        raise ValueError(f"p ({p}) must be a probability in [0, 1]")
    if not conditions:
        return {}
    labels = sorted(conditions)  # the draws must not depend on the order of a mapping
    ids = torch.stack([conditions[label] for label in labels])  # (labels, b)
    null = torch.tensor([n_classes[label] for label in labels], device=ids.device).unsqueeze(1)
    dropped = _uniform((1, ids.shape[1]), generator, ids.device) < p
    if strategy == "mutually_exclusive":
        # Keys of absent labels are negative, so that the largest key is an even draw among the labels a cell has.
        keys = torch.where(ids == null, -1.0, _uniform(ids.shape, generator, ids.device))
        kept = torch.arange(len(labels), device=ids.device).unsqueeze(1) == keys.argmax(dim=0)
        dropped = dropped | ~kept
    elif joint_dropout == "all_then_each":
        dropped = dropped | (_uniform(ids.shape, generator, ids.device) < p)
    elif joint_dropout == "each":
        dropped = _uniform(ids.shape, generator, ids.device) < p
    return dict(zip(labels, torch.where(dropped, null.to(ids.dtype), ids), strict=True))


def _uniform(shape: tuple[int, ...] | torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(device)
