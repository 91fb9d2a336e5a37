"""Which steps are taken, and what is said of those that are not; here on one worker."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.config.train import TrainConfig
from pipeline.training.callbacks import step_guard as guard_module
from pipeline.training.callbacks.early_stopping import BestSoFar
from pipeline.training.callbacks.step_guard import StepGuard, StepLosses, TrainingStopped
from pipeline.training.state import MeanLoss, Memory


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """A group of one."""
    monkeypatch.setattr(guard_module.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(guard_module.dist, "all_reduce", lambda x: None)
    monkeypatch.setattr(guard_module.dist, "all_gather_object", lambda out, x: out.__setitem__(0, x))


def step_of(losses: list[float], ids: list[int]) -> StepLosses:
    step = StepLosses(torch.device("cpu"))
    for loss, i in zip(losses, ids, strict=True):  # micro batches of one cell
        step.add(torch.tensor([loss]), torch.ones(1), torch.tensor([i]))
    return step


def guard(**settings) -> StepGuard:
    return StepGuard(TrainConfig.model_validate(settings))


def test_a_step_says_its_sum_and_how_many_losses_are_not_finite():
    assert step_of([1.0, 2.0], [7, 8]).reduced() == (3.0, 0)
    total, n_bad = step_of([1.0, math.nan, math.inf], [7, 8, 9]).reduced()
    assert math.isnan(total)
    assert n_bad == 2


def test_a_loss_that_is_not_finite_is_not_wanted_and_its_cells_are_named():
    g, step = guard(), step_of([1.0, math.nan], [7, 8])
    assert not g.wants(math.nan, 1)
    said = g.after(3, math.nan, step, applied=False)
    assert "step 3" in said
    assert "worker 0: soma_joinid 8" in said
    assert "1 in a row, 1 in all" in said


def test_where_only_the_gradient_is_not_finite_all_cells_of_the_step_are_named():
    said = guard().after(3, 1.5, step_of([1.0, 2.0], [7, 8]), applied=False)
    assert "finite losses of worker 0: soma_joinid 7, 8" in said


@pytest.mark.row("N2")
def test_steps_in_a_row_end_the_run_and_a_good_one_starts_the_count_again():
    g, step = guard(max_skipped=2), step_of([math.nan], [8])
    g.after(1, math.nan, step, applied=False)
    g.after(2, 1.0, step_of([1.0], [9]), applied=True)
    g.after(3, math.nan, step, applied=False)
    with pytest.raises(TrainingStopped, match=r"2 in a row, train\.max_skipped is 2") as stopped:
        g.after(4, math.nan, step, applied=False)
    assert "soma_joinid 8" in str(stopped.value)


def test_stop_ends_at_the_first():
    with pytest.raises(TrainingStopped, match=r"train\.non_finite is stop"):
        guard(non_finite="stop").after(1, math.nan, step_of([math.nan], [8]), applied=False)


@pytest.mark.parametrize(("action", "wanted"), [("log", True), ("skip", False)])
def test_a_spike_is_measured_against_the_median_of_the_steps_before(action, wanted):
    g = guard(spike={"factor": 3, "action": action, "window": 10})
    for i in range(10):
        assert g.wants(1.0 + i / 10, 0)
        g.after(i, 1.0 + i / 10, step_of([1.0], [1]), applied=True)
    assert g.wants(3 * 1.44, 0)
    assert g.wants(3 * 1.46, 0) is wanted
    said = g.after(11, 4.4, step_of([4.4], [5]), applied=wanted)
    assert "spike" in said
    assert "median of the last 10 steps 1.45" in said
    assert g.spikes == 1


def test_without_a_factor_no_loss_is_a_spike():
    g = guard()
    for i in range(20):
        g.after(i, 1.0, step_of([1.0], [1]), applied=True)
    assert g.wants(1e9, 0)
    assert g.state()["losses"] == []


def test_early_stopping_waits_for_patience_validations_and_the_best_is_remembered():
    best = BestSoFar(TrainConfig.model_validate({"early_stopping": {"patience": 3, "min_delta": 0.1}}))
    seen = [best.see(step, loss) for step, loss in enumerate([5.0, 4.0, 3.0, 3.5, 2.99, 3.2], start=1)]
    assert seen == [True, True, True, False, True, False]
    assert best.stopped, "2.99 is the best, but not by min_delta"
    assert (best.step, best.loss) == (5, 2.99)


def test_without_early_stopping_nothing_stops_and_nan_is_never_the_best():
    best = BestSoFar(TrainConfig())
    assert [best.see(i, x) for i, x in enumerate([math.nan, 2.0, 3.0, math.nan])] == [False, True, False, False]
    assert not best.stopped


def test_what_the_loop_remembers_comes_back_from_a_checkpoint():
    config = TrainConfig.model_validate({"spike": {"factor": 3}, "early_stopping": {"patience": 2}})
    made = [Memory(StepGuard(config), BestSoFar(config), MeanLoss()) for _ in range(2)]
    made[0].guard.after(1, 1.0, step_of([1.0], [1]), applied=True)
    made[0].guard.after(2, math.nan, step_of([math.nan], [1]), applied=False)
    made[0].best.see(2, 4.0)
    made[0].losses.add(8.0, 4)
    made[1].load(made[0].state())
    assert made[1].state() == made[0].state()
    assert made[1].losses.take() == 2.0
