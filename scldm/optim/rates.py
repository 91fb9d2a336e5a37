"""Learning rates that differ inside a parameter: what training starts from moves more slowly than what is new.

A step of AdamW, its weight decay too, is proportional to the learning rate, and its moments do not depend on it. So an
element with the rate f lr makes the step of lr, of which the fraction f is kept. That holds wherever the optimizer
keeps the element, and for tables with old and new rows. (Scaled gradients would change nothing: Adam divides by their
size.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SlowedPart:
    """Elements that an optimizer updates, and the fraction of its step that they make."""

    values: Tensor  # a view of what the optimizer updates, (n,)
    factor: float | Tensor  # of all of them, or of each, (n,)


@contextmanager
def slowed(parts: Sequence[SlowedPart]) -> Iterator[None]:
    """Take only a fraction of the optimizer's step that is made inside the context."""
    with torch.no_grad():
        before = [part.values.clone() for part in parts]
        yield
        for old, part in zip(before, parts, strict=True):
            part.values.copy_(torch.lerp(old, part.values, part.factor))


def old_row_factors(module: nn.Module, old_rows: Mapping[str, Tensor], factor: float) -> dict[str, float | Tensor]:
    """Return the factor of each trained parameter that holds something old: one number, or one for each row.

    Args:
        module: The network; what it does not train has no rate.
        old_rows: Parameter -> which of its rows (places in its first dimension) are old, bool (rows,), or () for all.
        factor: Learning rate of what is old, relative to what is new.
    """
    found: dict[str, float | Tensor] = {}
    for name, parameter in module.named_parameters():
        rows = old_rows.get(name)
        if rows is None or not parameter.requires_grad or not rows.any():
            continue
        found[name] = factor if rows.all() else torch.where(rows, factor, 1.0).float()
    return found


def piece_factor(factor: float | Tensor, *, row_size: int, start: int, numel: int) -> float | Tensor:
    """Return the factor of elements [start, start + numel) of a flattened parameter, one number or (numel,).

    Args:
        factor: Of the whole parameter, one number or one for each row.
        row_size: Elements of a row.
    """
    if isinstance(factor, float):
        return factor
    return factor[torch.arange(start, start + numel) // row_size]
