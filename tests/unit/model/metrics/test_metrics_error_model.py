"""Predicted errors of combinations: what is left out, what is known near them, and the intervals."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scldm.errors import InputError
from scldm.metrics.genes.expression import library_sizes
from scldm.metrics.perturbation.error_model import (
    FEWEST,
    ErrorModel,
    Ridge,
    coverage,
    left_out_predictions,
    verdicts,
)
from scldm.metrics.perturbation.leave_out import askable, energy_over_floor, folds, unmeasured
from scldm.metrics.perturbation.nearness import FEATURES, as_features, disagreement, indicators, nearness
from scldm.metrics.perturbation.screen import Screen
from scldm.metrics.perturbation.shift import CountShift

GENES = 30


def screen_of(pairs: dict[tuple[str, str], int], seed: int = 0) -> Screen:
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(1)
    base = {c: fixed.normal(0, 0.7, GENES) for c in sorted({c for c, _ in pairs})}
    effect = {t: fixed.normal(0, 0.8, GENES) * (t != "ctrl") for t in sorted({t for _, t in pairs})}
    each = [pair for pair, n in pairs.items() for _ in range(n)]
    share = np.stack([np.exp(base[c] + effect[t]) for c, t in each])
    counts = rng.poisson(share / share.sum(1, keepdims=True) * rng.integers(200, 400, (len(each), 1)))
    context, treatment = (np.array(x) for x in zip(*each, strict=True))
    return Screen(sp.csr_matrix(counts.astype(float)), context, treatment, "ctrl")


FULL = {(c, t): 30 for c in "abcd" for t in ("ctrl", "x", "y", "z")}


# ---- what is left out ------------------------------------------------------------------------------------------------
def test_folds_hold_every_combination_once_and_never_leave_a_treatment_without_a_context():
    screen = screen_of({k: n for k, n in FULL.items() if k not in {("a", "z"), ("b", "z"), ("c", "y")}})
    pairs = askable(screen)
    for most in (2, 3, 5, 9):
        for seed in range(10):
            found = folds(pairs, most, np.random.default_rng(seed))
            assert sorted(p for fold in found for p in fold) == sorted(pairs)
            for fold in found:
                known = screen.without(fold)
                assert not set(fold) & set(known.members)
                assert all(known.sources(*pair) for pair in fold)


def test_a_combination_needs_cells_controls_and_another_context_to_be_left_out():
    screen = screen_of({**FULL, ("a", "x"): 3, ("b", "ctrl"): 3, ("a", "only"): 30})
    pairs = askable(screen)
    assert ("a", "x") not in pairs  # too few cells
    assert not [p for p in pairs if p[0] == "b"]  # no controls
    assert ("a", "only") not in pairs  # no other context
    assert ("c", "x") in pairs


def test_unmeasured_combinations_have_controls_and_a_context_to_learn_from():
    screen = screen_of({**{k: n for k, n in FULL.items() if k != ("a", "x")}, ("e", "y"): 30})
    assert unmeasured(screen) == [("a", "x")]  # e has no controls


# ---- what is known near ----------------------------------------------------------------------------------------------
def test_nearness_is_the_same_whatever_the_cells_of_the_combination_are():
    first, second = screen_of(FULL), screen_of({**FULL, ("a", "x"): 7}, seed=0)
    known = [s.without([("a", "x")]) for s in (first, second)]
    rows = [s.context != "zzz" for s in known]
    assert all(r.all() for r in rows)
    numbers = nearness(known[0], "a", "x")
    assert numbers == pytest.approx(nearness(first, "a", "x"))  # its own cells do not count
    assert numbers["n_sources"] == pytest.approx(np.log(3))
    assert 0 < numbers["agreement"] < 1
    assert as_features(numbers).shape == (len(FEATURES),)
    assert np.isnan(as_features(numbers)[FEATURES.index("seeds")])


def test_disagreement_is_the_mean_distance_relative_to_the_strength():
    a, b, c = np.zeros(4), np.array([3.0, 4, 0, 0]), np.zeros(4)
    assert disagreement([a, b], np.log(2)) == pytest.approx(np.log(5 / 2))
    assert disagreement([a, b, c], 0.0) == pytest.approx(np.log(10 / 3))
    assert np.isnan(disagreement([a], 0.0))


def test_other_cells_of_the_same_distribution_are_at_the_floor_whatever_their_number():
    rng = np.random.default_rng(0)
    for n in (30, 300):
        found = [energy_over_floor(rng.normal(size=(n, 5)), rng.normal(size=(n, 5))) for _ in range(60)]
        assert np.mean(found) == pytest.approx(1, abs=0.35)
    far = [energy_over_floor(rng.normal(size=(n, 5)), rng.normal(1, 1, size=(n, 5))) for n in (50, 400)]
    assert far[0] == pytest.approx(far[1], rel=0.4)
    assert min(far) > 5


def test_the_floor_is_what_the_usual_statistic_gives_at_100_cells():
    rng = np.random.default_rng(0)
    big = rng.normal(size=(600, 4))
    usual = []
    for _ in range(200):
        x, y = rng.normal(size=(100, 4)), rng.normal(size=(100, 4))
        d = [np.linalg.norm(a[:, None] - b[None], axis=-1).mean() for a, b in ((x, y), (x, x), (y, y))]
        usual.append(2 * d[0] - d[1] - d[2])
    moved = big + 0.5
    ratio = energy_over_floor(big, moved)
    d = [np.linalg.norm(a[:, None] - b[None], axis=-1).mean() for a, b in ((big, moved), (big, big), (moved, moved))]
    energy = 2 * d[0] - d[1] - d[2]
    assert ratio == pytest.approx(1 + energy / np.mean(usual), rel=0.1)


# ---- the regression --------------------------------------------------------------------------------------------------
def test_the_leave_one_out_error_of_the_penalty_is_that_of_refitting():
    """The chosen penalty is the one that plain refits without each combination choose."""
    from scldm.metrics.perturbation.error_model import PENALTIES

    rng = np.random.default_rng(0)
    x, n = rng.normal(size=(15, 4)), 15
    y = x @ [1.0, -0.5, 0, 0] + rng.normal(0, 0.5, n)
    z = (x - x.mean(0)) / x.std(0)
    errors = []
    for penalty in PENALTIES:
        total = 0.0
        for i in range(n):
            rows = np.arange(n) != i
            a = np.c_[np.ones(n - 1), z[rows]]
            ridge = np.diag([0.0, *([n * penalty] * 4)]) if np.isfinite(penalty) else np.diag([0.0, *([1e12] * 4)])
            w = np.linalg.solve(a.T @ a + ridge, a.T @ y[rows])
            total += (y[i] - np.r_[1, z[i]] @ w) ** 2
        errors.append(total)
    best = PENALTIES[int(np.argmin(errors))]
    a = np.c_[np.ones(n), z]
    w = np.linalg.solve(a.T @ a + np.diag([0.0, *([n * best] * 4)]), a.T @ y)
    fitted = Ridge.fit(x, y)
    np.testing.assert_allclose(fitted.weights / fitted.scale * x.std(0), w[1:], rtol=1e-6)
    assert fitted(x[:3]) == pytest.approx(a[:3] @ w)


def test_a_feature_that_is_unknown_or_does_not_vary_changes_nothing():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 2)), rng.normal(size=12)
    more = np.c_[x, np.full(12, np.nan), np.full(12, 7.0)]
    np.testing.assert_allclose(Ridge.fit(more, y)(more), Ridge.fit(x, y)(x))


def test_intervals_hold_nine_of_ten_errors():
    """500 screens of 12 combinations each: jackknife+ of 12, and the interval of each without itself."""
    rng = np.random.default_rng(0)
    inside, own = [], []
    for _ in range(500):
        weights = rng.normal(0, 0.5, 7) * (rng.random(7) < 0.4)
        x = rng.normal(size=(13, 7))
        noise = rng.standard_t(4, 13) * 0.5
        y = x @ weights + noise
        found = ErrorModel.fit(x[:12], y[:12]).predict(x[12:])
        inside.append(found.low[0] <= y[12] <= found.high[0])
    for _ in range(60):
        x = rng.normal(size=(12, 7))
        y = x[:, 0] + rng.normal(0, 0.5, 12)
        own.append(coverage(y, left_out_predictions(x, y)))
    assert 0.85 <= np.mean(inside) <= 0.96
    assert 0.85 <= np.mean(own) <= 0.97


def test_near_combinations_make_the_interval_narrower_than_the_range_of_errors():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    y = 2 * x[:, 0] + rng.normal(0, 0.1, 40)
    found = ErrorModel.fit(x, y).predict(np.array([[0.0, 0, 0]]))
    assert found.calibrated
    assert found.high[0] - found.low[0] < 0.2 * np.ptp(y)
    assert found.value[0] == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("n", [1, 2, FEWEST - 1])
def test_of_few_combinations_the_interval_is_the_range_of_their_errors(n: int):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, 3)), rng.normal(size=n)
    found = ErrorModel.fit(x, y).predict(np.zeros((1, 3)))
    assert not found.calibrated
    assert found.low[0] <= y.min()
    assert found.high[0] >= y.max()


def test_many_combinations_are_left_out_in_groups():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 5))
    y = x[:, 0] + rng.normal(0, 1, 150)
    found = left_out_predictions(x, y)
    assert 0.82 <= coverage(y, found) <= 0.97


# ---- the shift in counts ---------------------------------------------------------------------------------------------
def test_contexts_and_treatments_have_a_column_each_if_there_are_several():
    known = [("a", "x"), ("b", "x"), ("b", "y")]
    assert indicators(known, known).tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    assert indicators([("new", "y")], known).tolist() == [[0, 0, 0, 1]]
    assert indicators([("a", "x"), ("b", "x")], [("a", "x"), ("b", "x")]).tolist() == [[1, 0], [0, 1]]
    assert indicators([("a", "x")], [("a", "x")]).shape == (1, 0)
    assert indicators([], known).shape == (0, 4)


def test_a_verdict_follows_what_is_near_only_where_that_tells_more_than_the_more_frequent_winner():
    rng = np.random.default_rng(0)
    x, asked = rng.normal(size=(24, 2)), np.array([[-3.0, 0.0], [3.0, 0.0]])
    told = verdicts(x, x[:, 0] + 0.1 * rng.normal(size=24), asked)
    assert told.by_features
    assert told.better.tolist() == [True, False]
    assert told.right > 0.8 > told.always
    noise = rng.normal(size=24) - 1.0
    blind = verdicts(x, noise, asked)
    assert not blind.by_features
    assert blind.better.tolist() == [True, True]
    assert blind.always == (noise < 0).mean()
    assert blind.right <= blind.always


def test_the_verdict_on_a_combination_does_not_know_its_error():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(12, 2)), rng.normal(size=12)
    other = y.copy()
    other[3] = -5 * y[3]
    assert verdicts(x, y, x).left_out[3] == verdicts(x, other, x).left_out[3]
    alone = verdicts(x[:1], y[:1], x)
    assert np.isnan(alone.left_out).all()
    assert np.isnan(alone.right)
    assert alone.better.tolist() == [bool(y[0] < 0)] * 12


def test_the_shift_in_counts_has_the_means_that_it_says():
    screen = screen_of(FULL)
    shift = CountShift.learn(screen, "a", "x")
    assert shift.sources == ("b", "c", "d")
    cells = screen.cells("a", "ctrl")
    rng = np.random.default_rng(0)
    drawn = np.mean([shift.apply(cells, rng).toarray() for _ in range(400)], axis=0)
    expected = shift.expected(cells)
    assert np.abs(drawn.mean(0) - expected.mean(0)).max() < 0.03 * expected.mean(0).max()
    assert library_sizes(sp.csr_matrix(expected)).mean() == pytest.approx(library_sizes(cells).mean(), rel=0.3)


def test_a_treatment_of_one_context_alone_has_no_shift():
    screen = screen_of({**FULL, ("a", "only"): 30})
    with pytest.raises(InputError, match="'only' was measured beside 'ctrl' in no context but 'a'"):
        CountShift.learn(screen, "a", "only")
