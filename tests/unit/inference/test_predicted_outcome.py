"""From errors of left-out combinations to verdicts, on numbers that can be followed by eye."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.stages.screen_case import CONTROL, HELD_OUT, SOURCE, screen_inputs

from pipeline.stages.unseen.finished import BETTER, BETTER_THAN_POOLED, NO_BETTER, NO_BETTER_THAN_POOLED
from pipeline.stages.unseen.left_out import ANSWERS, POOLED, Group, GroupResult
from pipeline.stages.unseen.outcome import outcome
from pipeline.stages.unseen.screen import read_screen
from pipeline.stages.unseen.ways import WAYS
from scldm.metrics.perturbation.free_answers import COUNTS, NEAREST
from scldm.metrics.perturbation.leave_out import askable, folds, unmeasured


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    source = {**SOURCE, "n_types": 6, "n_cells": 1_400}
    return read_screen(
        screen_inputs(tmp_path_factory.mktemp("screen"), source=source)["ingest"], CONTROL, max_cells=None, seed=0
    )


def results(cells, groups, *, ours: float, shift: float, seeds: int = 2):
    """Every answer has an energy distance of 4 and a correlation of 0.5, pooled cells and the shift in counts their
    own."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(seeds):
        of_seed = []
        for group in groups:
            k = len(group.pairs)
            scores = np.full((k, len(ANSWERS), 2), [4.0, 0.5])
            scores[:, ANSWERS.index(POOLED), 0] = ours * np.exp(rng.normal(0, 0.05, k))
            scores[:, ANSWERS.index(COUNTS), 0] = shift
            scores[:, ANSWERS.index(NEAREST), 0] = 3.0
            means = rng.random((k, len(WAYS), cells.vocabulary.n_genes), dtype=np.float32)
            of_seed.append(GroupResult(means, scores if group.measured else np.full_like(scores, np.nan)))
        found.append(of_seed)
    return found


@pytest.fixture(scope="module")
def groups(cells):
    left_out = folds(askable(cells.screen), 3, np.random.default_rng(0))
    made = [Group(f"group{i}", tuple(pairs), True) for i, pairs in enumerate(left_out)]
    return [*made, Group("unmeasured", tuple(unmeasured(cells.screen)), False)]


@pytest.mark.parametrize(("ours", "shift", "verdict"), [(2.0, 4.0, BETTER), (6.0, 4.0, NO_BETTER)])
def test_the_verdict_is_about_the_shift_in_counts(cells, groups, ours, shift, verdict):
    found = outcome(cells, groups, results(cells, groups, ours=ours, shift=shift))
    row = found.predicted.iloc[0]
    assert {k: row[k] for k in HELD_OUT} == HELD_OUT
    assert row["verdict"] == verdict
    assert row["energy_over_floor"] == pytest.approx(ours, rel=0.1)
    assert row["delta_pearson"] == pytest.approx(0.5, abs=0.01)
    assert row["free_answer"] == NEAREST
    assert row["free_energy_over_floor"] == pytest.approx(3.0)
    assert found.facts["verdict_right"] == 1.0
    assert found.facts["verdict_always"] == 1.0  # so that nothing is shown to have skill
    assert any("naming the more frequent winner every time (100% right)" in note for note in found.notes)


@pytest.mark.parametrize(
    ("ours", "shift", "verdict"), [(2.0, 4.0, NO_BETTER_THAN_POOLED), (6.0, 4.0, BETTER_THAN_POOLED)]
)
def test_cells_of_the_shift_are_compared_with_pooled_ones(cells, groups, ours, shift, verdict):
    found = outcome(cells, groups, results(cells, groups, ours=ours, shift=shift), "shift")
    row = found.predicted.iloc[0]
    assert row["verdict"] == verdict
    assert row["energy_over_floor"] == pytest.approx(shift, rel=0.01)
    assert found.facts["answer"] == COUNTS
    assert found.facts["better_than_pooled"] == float(ours > shift)


def test_cells_of_a_flow_have_scores_and_verdicts_of_their_own(cells, groups):
    found = outcome(cells, groups, results(cells, groups, ours=2.0, shift=3.0), "flow")
    row = found.predicted.iloc[0]
    assert row["energy_over_floor"] == pytest.approx(4.0, rel=0.01)
    assert row["verdict"] == NO_BETTER


def test_with_enough_combinations_intervals_are_calibrated_and_their_coverage_is_a_fact(cells, groups):
    found = outcome(cells, groups, results(cells, groups, ours=2.0, shift=4.0))
    assert found.facts["n_left_out"] == 11
    assert found.facts["calibrated"]
    assert found.predicted["interval"].tolist() == ["90 %"]
    ours = found.left_out[found.left_out["answer"] == POOLED]
    inside = (ours["energy_over_floor"] >= ours["energy_over_floor_predicted_low"]) & (
        ours["energy_over_floor"] <= ours["energy_over_floor_predicted_high"]
    )
    assert found.facts["coverage_90"]["energy_over_floor"] == pytest.approx(inside.mean())
    assert inside.mean() >= 0.7
    row = found.predicted.iloc[0]
    assert row["energy_over_floor_low"] < row["energy_over_floor"] < row["energy_over_floor_high"]


def test_a_single_seed_says_nothing_of_their_disagreement_and_is_enough(cells, groups):
    found = outcome(cells, groups, results(cells, groups, ours=2.0, shift=4.0, seeds=1))
    assert np.isfinite(found.predicted["energy_over_floor"]).all()


def test_without_unmeasured_combinations_the_errors_of_the_measured_ones_remain(cells, groups):
    known = groups[:-1]
    found = outcome(cells, known, results(cells, known, ours=2.0, shift=4.0))
    assert len(found.predicted) == 0
    assert {"delta_pearson", "verdict", "cell_type"} <= set(found.predicted)
    assert found.facts["n_predicted"] == 0
    assert len(found.left_out) == 11 * len(ANSWERS)
