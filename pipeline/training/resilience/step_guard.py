"""Steps that must not reach the weights: losses that are not finite, and spikes.

A decision is taken from sums over all workers, so that all of them take the same one. The guard's memory (how many
steps it left out, the losses that a spike is measured against) is part of every checkpoint: a run that goes on decides
as the uninterrupted one would have.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.train import TrainConfig

NAMED = 8  # cells that a message names, per worker
JUDGED_FROM = 10  # losses that a median needs


class TrainingStopped(Exception):
    """The run cannot go on, and starting it again would end the same."""


@dataclass
class StepLosses:
    """Losses of one worker's cells in a step, gathered over its micro batches."""

    device: torch.device
    losses: list[Tensor] = field(default_factory=list)  # (b,) each
    joinids: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def add(self, loss: Tensor, weight: Tensor, joinids: Tensor) -> None:
        self.losses.append(loss.detach())
        self.weights.append(weight)
        self.joinids.append(joinids)

    def reduced(self) -> tuple[float, int]:
        """Sum of the losses over all workers' cells, and how many of them are not finite. Collective."""
        loss, weight = torch.cat(self.losses).double(), torch.cat(self.weights)
        bad = ~loss.isfinite()
        sums = torch.stack([(loss * weight).sum(), bad.sum().double()])
        dist.all_reduce(sums)
        total, n_bad = sums.tolist()
        return total, int(n_bad)

    def offenders(self) -> str:
        """Which cells of which workers have no finite loss; where all have one, which cells there are. Collective."""
        loss, ids = torch.cat(self.losses).cpu(), torch.cat(self.joinids).cpu()
        bad = ids[~loss.isfinite()].tolist()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (bad, ids.tolist()))
        if any(b for b, _ in everyone):
            named = [f"worker {r}: soma_joinid {_list(b)}" for r, (b, _) in enumerate(everyone) if b]
            return "no finite loss of " + "; ".join(named)
        named = [f"worker {r}: soma_joinid {_list(all_)}" for r, (_, all_) in enumerate(everyone)]
        return "finite losses of " + "; ".join(named)


class StepGuard:
    """Decides of every step whether it is taken, by `train.non_finite`, `train.max_skipped` and `train.spike`."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.skipped, self.in_a_row, self.spikes = 0, 0, 0
        self._losses: deque[float] = deque(maxlen=config.spike.window)

    def wants(self, loss: float, n_bad: int) -> bool:
        """Whether a step with this mean loss is to be taken."""
        return not n_bad and math.isfinite(loss) and not (self._is_spike(loss) and self.config.spike.action == "skip")

    def after(self, step: int, loss: float, losses: StepLosses, *, applied: bool) -> str | None:
        """Account for a step that was or was not taken; what is to be said about it. Collective.

        Raises:
            TrainingStopped: on all workers, where the settings say that the run ends.
        """
        spike = math.isfinite(loss) and self._is_spike(loss)
        left_out = spike and self.config.spike.action == "skip"
        self.spikes += spike
        if applied:
            self.in_a_row = 0
            said = f"step {step} is a spike: {self._against(loss)}" if spike else None
            self._losses.append(loss)
            return said
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        what = f"a spike ({self._against(loss)})" if left_out else "a loss or gradient that is not finite"
        said = f"step {step} has {what}; {losses.offenders()}"
        if not left_out and self.config.non_finite == "stop":
            raise TrainingStopped(
                f"{said}. train.non_finite is stop; take the cells out (scldm validate-data), lower "
                "train.optimizer.lr, or set train.non_finite=skip"
            )
        if self.in_a_row >= self.config.max_skipped:
            raise TrainingStopped(
                f"{said}. It is number {self.in_a_row} in a row, train.max_skipped is {self.config.max_skipped}; lower "
                "train.optimizer.lr or train.optimizer.clip, or look at these cells (scldm validate-data)"
            )
        return f"{said}. Left out on all workers: {self.in_a_row} in a row, {self.skipped} in all"

    def _is_spike(self, loss: float) -> bool:
        factor = self.config.spike.factor
        return factor is not None and len(self._losses) >= JUDGED_FROM and loss > factor * self._median()

    def _median(self) -> float:
        return statistics.median(self._losses)

    def _against(self, loss: float) -> str:
        return f"loss {loss:.4g}, median of the last {len(self._losses)} steps {self._median():.4g}"

    # ---- memory ------------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes}
        return counts | {"losses": list(self._losses) if self.config.spike.factor is not None else []}

    def load(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.spikes = state["skipped"], state["in_a_row"], state["spikes"]
        self._losses.extend(state["losses"])


def _list(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:NAMED])) + (f", … ({len(ids)})" if len(ids) > NAMED else "")
