"""Weights of predictions of a mean shift, learned from combinations that are left out."""

from __future__ import annotations

import numpy as np
import pytest

from scldm.metrics.perturbation.pooled import TOWARDS_EQUAL, learn_weights

GENES, COMBINATIONS = 200, 6


def errors(rng: np.random.Generator, *sizes: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Shifts, and predictions of them whose errors have given standard deviations."""
    measured = [rng.normal(size=GENES) for _ in range(COMBINATIONS)]
    return [np.stack([y + s * rng.normal(size=GENES) for s in sizes]) for y in measured], measured


def test_a_prediction_that_errs_less_has_a_larger_weight():
    weights = learn_weights(*errors(np.random.default_rng(0), 1.0, 1.0, 0.2, 1.0))
    assert weights.argmax() == 2
    assert weights[2] > 0.4
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 0


def test_the_flow_never_has_more_than_an_equal_weight():
    """It has seen the combinations: an error of 0 there says little of others."""
    weights = learn_weights(*errors(np.random.default_rng(0), 1.0, 1.0, 1.0, 0.0))
    assert weights[3] == pytest.approx(1 / 3, abs=1e-4)


def test_a_flow_that_learned_nothing_has_no_weight_to_speak_of():
    predicted, measured = errors(np.random.default_rng(0), 0.3, 0.3, 0.3, 0.0)
    for x in predicted:
        x[3] = 0
    assert learn_weights(predicted, measured)[3] < 0.1


def test_weights_are_equal_if_nothing_can_be_left_out():
    assert learn_weights([], []).tolist() == [0.25] * 4


def test_weights_are_those_of_a_search():
    predicted, measured = errors(np.random.default_rng(1), 0.8, 0.5, 0.4, 0.9)
    found, rng = learn_weights(predicted, measured), np.random.default_rng(2)

    def error(w: np.ndarray) -> float:
        of_data = sum(((y - w @ x) ** 2).sum() / (y @ y) for x, y in zip(predicted, measured, strict=True))
        size = sum((x**2).sum() / (y @ y) for x, y in zip(predicted, measured, strict=True)) / 4
        size /= COMBINATIONS
        return of_data + TOWARDS_EQUAL * size * ((w - 0.25) ** 2).sum()

    others = rng.dirichlet(np.ones(4), 20_000)
    others = others[others[:, 3] <= 1 / 3]
    assert error(found) <= min(map(error, others)) + 1e-6
