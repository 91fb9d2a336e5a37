"""Which part of a step a micro batch is, and what an objective is: the words that the loop and its objectives share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import pyarrow as pa
from torch import Tensor, nn


@dataclass(frozen=True)
class Slice:
    """Which part of a step a micro batch is."""

    step: int
    epoch: int
    start: int  # first row of the micro batch among this worker's rows of the step


class Objective(Protocol):
    """What is trained."""

    module: nn.Module
    validate_with_ema: bool

    def prepare(self, table: pa.Table, part: Slice) -> Any:
        """A batch on the CPU: a dataclass of tensors with `weight` and `joinids`, both (b,). Runs in a thread."""

    def loss(self, model: Callable[..., Tensor], batch: Any, part: Slice) -> Tensor:
        """Loss of each cell of a micro batch, (b,); the batch is on the module's device."""

    def validation(self, rank: int, world_size: int) -> tuple[dict[str, float], int]:
        """Sums over this worker's share of the validation cells, by name, `loss` among them; and the cells' number."""


def map_tensors(batch: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """The batch with f of every tensor in it: in dataclasses, maps, tuples and lists."""
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, dict):
        return {k: map_tensors(v, f) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(v, f) for v in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{x.name: map_tensors(getattr(batch, x.name), f) for x in fields(batch)})
    return batch
