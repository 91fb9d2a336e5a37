"""Skipped steps, spikes and early stopping; on one worker."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pipeline.config.train import TrainConfig
from pipeline.training import state as state_module
from pipeline.training.callbacks.early_stopping import EarlyStopping
from pipeline.training.callbacks.metrics_log import MeanLoss
from pipeline.training.callbacks.step_guard import StepGuard
from pipeline.training.state import StepLosses, TrainingStopped


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """A group of one."""
    monkeypatch.setattr(state_module.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(state_module.dist, "all_reduce", lambda x: None)
    monkeypatch.setattr(state_module.dist, "all_gather_object", lambda out, x: out.__setitem__(0, x))


def step_of(losses: list[float], ids: list[int]) -> StepLosses:
    step = StepLosses(torch.device("cpu"), n_cells=len(ids))
    for loss, i in zip(losses, ids, strict=True):  # micro batches of one cell
        step.add(torch.tensor([loss]), torch.ones(1), torch.tensor([i]))
    step.reduce()
    return step


def guard(**settings) -> StepGuard:
    return StepGuard(TrainConfig.model_validate(settings))


def test_the_losses_of_a_step_are_summed_and_the_non_finite_ones_counted():
    step = step_of([1.0, 2.0], [7, 8])
    assert (step.total, step.mean, step.n_non_finite) == (3.0, 1.5, 0)
    step = step_of([1.0, math.nan, math.inf], [7, 8, 9])
    assert math.isnan(step.total)
    assert step.n_non_finite == 2


def test_a_loss_that_is_not_finite_is_refused_and_its_cells_are_named():
    g, step = guard(), step_of([1.0, math.nan], [7, 8])
    assert not g.accepts(math.nan, 1)
    message = g.record(3, step, applied=False)
    assert "step 3" in message
    assert "worker 0: soma_joinid 8" in message
    assert "1 in a row, 1 in total" in message


def test_if_only_the_gradient_is_not_finite_all_cells_of_the_step_are_named():
    message = guard().record(3, step_of([1.0, 2.0], [7, 8]), applied=False)
    assert "the losses are finite" in message
    assert "worker 0: soma_joinid 7, 8" in message


@pytest.mark.row("N2")
def test_skipped_steps_in_a_row_end_the_run_and_a_good_one_resets_the_count():
    g, step = guard(max_skipped=2), step_of([math.nan], [8])
    g.record(1, step, applied=False)
    g.record(2, step_of([1.0], [9]), applied=True)
    g.record(3, step, applied=False)
    with pytest.raises(TrainingStopped, match=r"2 in a row, train\.max_skipped is 2") as stopped:
        g.record(4, step, applied=False)
    assert "soma_joinid 8" in str(stopped.value)


def test_stop_ends_at_the_first():
    with pytest.raises(TrainingStopped, match=r"train\.non_finite is stop"):
        guard(non_finite="stop").record(1, step_of([math.nan], [8]), applied=False)


@pytest.mark.parametrize(("action", "wanted"), [("log", True), ("skip", False)])
def test_a_spike_is_measured_against_the_median_of_the_steps_before(action, wanted):
    g = guard(spike={"factor": 3, "action": action, "window": 10})
    for i in range(10):
        assert g.accepts(1.0 + i / 10, 0)
        g.record(i, step_of([1.0 + i / 10], [1]), applied=True)
    assert g.accepts(3 * 1.44, 0)
    assert g.accepts(3 * 1.46, 0) is wanted
    message = g.record(11, step_of([4.4], [5]), applied=wanted)
    assert "spike" in message
    assert "median of the last 10 steps 1.45" in message
    assert g.spikes == 1


def test_without_a_factor_no_loss_is_a_spike():
    g = guard()
    for i in range(20):
        g.record(i, step_of([1.0], [1]), applied=True)
    assert g.accepts(1e9, 0)
    assert g.state_dict()["losses"] == []


def test_early_stopping_waits_for_patience_validations_and_the_best_is_remembered():
    best = EarlyStopping(TrainConfig.model_validate({"early_stopping": {"patience": 3, "min_delta": 0.1}}))
    seen = [best.update(step, loss) for step, loss in enumerate([5.0, 4.0, 3.0, 3.5, 2.99, 3.2], start=1)]
    assert seen == [True, True, True, False, True, False]
    assert best.stopped, "2.99 is the best, but not by min_delta"
    assert (best.step, best.loss) == (5, 2.99)


def test_without_early_stopping_nothing_stops_and_nan_is_never_the_best():
    best = EarlyStopping(TrainConfig())
    assert [best.update(i, x) for i, x in enumerate([math.nan, 2.0, 3.0, math.nan])] == [False, True, False, False]
    assert not best.stopped


def test_callbacks_restore_their_state_from_a_checkpoint():
    config = TrainConfig.model_validate({"spike": {"factor": 3}, "early_stopping": {"patience": 2}})
    before = StepGuard(config), EarlyStopping(config), MeanLoss()
    after = StepGuard(config), EarlyStopping(config), MeanLoss()
    before[0].record(1, step_of([1.0], [1]), applied=True)
    before[0].record(2, step_of([math.nan], [1]), applied=False)
    before[1].update(2, 4.0)
    before[2].add(8.0, 4)
    for old, new in zip(before, after, strict=True):
        new.load_state_dict(json.loads(json.dumps(old.state_dict())))
        assert new.state_dict() == old.state_dict()
    assert after[2].take() == 2.0
