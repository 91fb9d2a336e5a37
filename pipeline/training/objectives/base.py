"""Which part of a step a micro batch is, and what an objective is: the words that the loop and its objectives share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
