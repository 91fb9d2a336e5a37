"""The base class of callbacks: what a policy of training may do, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.training.state import StepLosses, TrainingState


class TrainingCallback:
    """A policy of the training loop. Every hook does nothing unless a subclass overrides it.

    Hooks run on every rank that has the callback, callback by callback in the order of the list. A hook may be
    collective if all ranks have the callback. `on_train_start` runs once before the first step, after a checkpoint was
    loaded. Then, in every step and in this order:

    1. `on_step_start`: the step's cells are on the device.
    2. `on_gradient_exchange`: once or more; this worker begins to compute gradients that are exchanged.
    3. `accept_update`: the gradients are there. The weights change only if all callbacks accept.
    4. `on_update`: the weights were or were not changed.
    5. `on_validation_end`: in steps with a validation.
    6. `collect_metrics`: every `LOG_EVERY` steps and in the last one.
    7. `on_step_end`: metrics and validation are complete; requests made here still count for this step.
    8. `on_checkpoint`: in steps that saved a checkpoint, or failed to.

    `on_train_end` runs once when the loop ends, also by an exception, in the reverse order of the list.

    If `state_key` is set, every checkpoint holds the `state_dict` of rank 0 under that key, and every rank loads it.

    Example:
        >>> class StopAtLoss(TrainingCallback):
        ...     def on_validation_end(self, state):
        ...         if state.validation["val/loss"] < 0.1:
        ...             state.request_finish()
        >>> run_training(objective, source, order, config, run, callbacks=[StopAtLoss()])
    """

    state_key: str | None = None

    def on_train_start(self, state: TrainingState) -> None:
        """Run before the first step, after a checkpoint was loaded."""

    def on_step_start(self, state: TrainingState) -> None:
        """Run before a step computes anything; `state.step` still counts the steps before it."""

    def on_gradient_exchange(self, state: TrainingState) -> None:
        """Run before a backward pass whose gradients are exchanged with the other workers."""

    def accept_update(self, state: TrainingState, losses: StepLosses) -> bool:
        """Return whether the weights may be updated; every rank must return the same."""
        return True

    def on_update(self, state: TrainingState, losses: StepLosses, *, applied: bool) -> None:
        """Run after the optimizer step.

        Args:
            applied: Whether the weights changed.
        """

    def on_validation_end(self, state: TrainingState) -> None:
        """Run after a validation, whose results are in `state.validation`."""

    def collect_metrics(self, state: TrainingState) -> dict[str, float]:
        """Return metrics of the steps since the last call; they are merged into `state.metrics`.

        `state.metrics` is the same on all ranks only if every rank has the callback and it returns the same on each,
        reduced over the ranks if need be. Otherwise no decision that all ranks share may depend on these metrics.
        """
        return {}

    def on_step_end(self, state: TrainingState) -> None:
        """Run at the end of a step, before its checkpoint."""

    def on_checkpoint(self, state: TrainingState, *, saved: bool) -> None:
        """Run after a checkpoint was committed, or could not be."""

    def on_train_end(self, state: TrainingState) -> None:
        """Run when the loop ends, also by an exception, in the reverse order of the list."""

    def facts(self) -> dict[str, Any]:
        """Return what the stage's manifest records about a finished run."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return this callback's part of a checkpoint, as plain data for JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
