"""Decides in which steps a checkpoint is saved, and reports it to the caller of the training."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.config.train import TrainConfig
from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.state import TrainingState


class CheckpointSchedule(TrainingCallback):
    """Requests a checkpoint every `train.checkpoint_every` steps. The loop saves one where the run ends in any case.

    Saving is collective, so all ranks must request a checkpoint in the same step. A number of steps is the same on all
    of them; clocks are not. A policy by time has to decide on rank 0 and broadcast the decision, as `StopSignal` does
    by a reduction that overlaps with the step.

    Args:
        report: Called on every rank with step and metrics after a checkpoint was committed; under Ray Train it is
            collective.
    """

    def __init__(self, config: TrainConfig, report: Callable[[dict[str, float]], None]):
        self.config, self.report = config, report

    def on_step_end(self, state: TrainingState) -> None:
        if state.step % self.config.checkpoint_every == 0:
            state.request_checkpoint()

    def on_checkpoint(self, state: TrainingState, *, saved: bool) -> None:
        if saved:
            self.report({"step": state.step, **state.metrics})
