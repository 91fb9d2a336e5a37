"""The interface between the training loop and what it trains: objectives, batches and micro-batch indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import pyarrow as pa
from torch import Tensor, nn


@dataclass(frozen=True)
class MicroBatchIndex:
    """Which part of a training run a micro batch is. Random draws are keyed by it, never by the worker."""

    step: int
    epoch: int
    start: int  # first row of the micro batch among this worker's rows of the step


class Batch(Protocol):
    """A dataclass of tensors for b cells."""

    @property
    def weight(self) -> Tensor:
        """1 for a cell, 0 for a repeat that fills the batch; (b,)."""

    @property
    def joinids(self) -> Tensor:
        """The cells' ids; (b,)."""


class Objective(Protocol):
    """A network with its loss and its validation.

    Attributes:
        module: What is trained.
        validate_with_ema: Whether validation uses the averaged weights, if there are any.
    """

    module: nn.Module
    validate_with_ema: bool

    @property
    def sample_scores(self) -> Mapping[str, float]:
        """Scores of the cells that the last validation generated, by name; empty if it generated none.

        The loop adds them to the metrics as `val/<name>`, until the next validation. They need not be the same on all
        ranks: only rank 0 may generate, and only its metrics are logged. A validation replaces the mapping.
        """

    def prepare(self, table: pa.Table, index: MicroBatchIndex) -> Any:
        """Make a `Batch` on the CPU. Runs in a thread."""

    def loss(self, model: Callable[..., Any], batch: Any, index: MicroBatchIndex) -> Tensor:
        """Return the loss of each cell of a micro batch, (b,).

        Args:
            model: The module, or the engine around it.
            batch: What `prepare` made, on the module's device.
        """

    def validation(self, rank: int, world_size: int) -> tuple[dict[str, float], int]:
        """Return sums over this worker's share of the validation cells, by name, with `loss` among them, and the number
        of these cells."""


def map_tensors(batch: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """Apply f to every tensor of a batch: in dataclasses, mappings, tuples and lists."""
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, Mapping):
        return {k: map_tensors(v, f) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(v, f) for v in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{x.name: map_tensors(getattr(batch, x.name), f) for x in fields(batch)})
    return batch
