"""Intervals from random halves, and the conclusions that they allow."""

import numpy as np
import pytest
from helpers.models.metric_cells import cells, comparison
from scipy.stats import t as student

from scldm.metrics.distribution import distances as d
from scldm.metrics.resampling import Halves, half_width
from scldm.metrics.score import Score, at_floor, checked, judge


def score(value, replicates=None, **changes):
    fields = {"better": "lower", "ideal": 0.0, "group": "distance", "title": "d"} | changes
    return Score(value, replicates=None if replicates is None else np.asarray(replicates, float), **fields)


def test_halves_take_half_of_every_stratum_and_no_cell_twice():
    strata = np.array(["a"] * 10 + ["b"] * 7 + [None] * 4, dtype=object)
    halves = Halves.draw(strata, 50, np.random.default_rng(0))
    assert set(halves.chosen.sum(1)) <= {10, 11}
    assert set(halves.chosen[:, :10].sum(1)) == {5}
    assert set(halves.chosen[:, 10:17].sum(1)) == {3, 4}
    assert set(halves.chosen[:, 17:].sum(1)) == {2}
    np.testing.assert_allclose(halves.chosen.mean(0), 0.5, atol=0.25)
    np.testing.assert_allclose(halves.weights.sum(1), 1)


def test_same_seed_same_halves():
    draw = lambda seed: Halves.draw(np.full(20, ""), 5, np.random.default_rng(seed)).chosen  # noqa: E731
    assert (draw(0) == draw(0)).all()
    assert (draw(0) != draw(1)).any()


def test_the_interval_of_a_mean_is_the_textbook_one():
    x = np.random.default_rng(0).normal(size=400)
    halves = Halves.draw(np.full(400, ""), 1000, np.random.default_rng(1))
    width = half_width(halves.weights[1:] @ x)
    assert width == pytest.approx(1.96 * x.std() / np.sqrt(400), rel=0.08)
    few = np.array([1.0, 2.0, 3.0])
    assert half_width(few) == pytest.approx(student.ppf(0.975, 2))


@pytest.mark.parametrize(
    "metric",
    [d.energy_distance, d.mmd2_median, d.frechet_distance, lambda x, y: d.matched(x, y, power=2, points=len(x))],
    ids=["energy", "mmd2", "frechet", "w2"],
)
def test_the_spread_of_halves_is_the_spread_over_new_samples(metric):
    """Of distances, which are no means over cells: against 60 pairs of new samples."""
    rng = np.random.default_rng(0)
    pair = lambda: (rng.normal(size=(80, 3)), rng.normal(size=(80, 3)) + 0.7)  # noqa: E731
    true = np.std([metric(*pair()) for _ in range(60)])
    widths = []
    for _ in range(6):
        x, y = pair()
        a, b = (Halves.draw(np.full(80, ""), 30, rng) for _ in range(2))
        widths.append(np.std([metric(x[a.members(k)], y[b.members(k)]) for k in range(30)]))
    assert np.mean(widths) == pytest.approx(true, rel=0.4)


def test_an_interval_is_cut_where_the_score_ends():
    low, high = score(0.1, [0.0, 0.2, 0.4], bounds=(0.0, np.inf)).interval
    assert low == 0
    assert high == pytest.approx(0.1 + half_width(np.array([0.0, 0.2, 0.4])))
    assert score(0.1).interval is None


def test_differences_are_reported_only_when_significant():
    rng = np.random.default_rng(0)
    noise = lambda: rng.normal(0, 0.1, 50)  # noqa: E731
    floor = score(1.0, 1 + noise())
    close, far, unclear = score(1.2, 1.2 + noise()), score(3.0, 3 + noise()), score(1.25, 1.25 + noise())
    assert judge(close, far, floor) == "nearer"
    assert judge(far, close, floor) == "farther"
    assert judge(close, unclear, floor) == "not told apart"
    assert judge(score(1.2), far, floor) is None
    assert at_floor(close, floor)
    assert not at_floor(far, floor)


def test_equal_scores_seldom_differ_significantly():
    """Both at the floor: an absolute difference folds the spread, which must not turn chance into a verdict."""
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(200):
        values = rng.normal(0, 0.1, 3)
        called += judge(*(score(v, v + rng.normal(0, 0.1, 10)) for v in values)) != "not told apart"
    assert called <= 10


def test_better_than_the_floor_is_as_bad_as_worse():
    rng = np.random.default_rng(0)
    floor, below, above = (score(v, v + rng.normal(0, 0.01, 50)) for v in (2.0, 1.0, 2.5))
    assert judge(above, below, floor) == "nearer"


def test_what_both_have_in_common_does_not_hide_a_difference():
    """All three move with the half of the real cells; a paired difference does not."""
    shared = np.random.default_rng(0).normal(0, 1, 50)
    floor, near, far = (score(v, v + shared + np.linspace(0, 0.01, 50)) for v in (0.0, 1.0, 1.1))
    assert judge(near, far, floor) == "nearer"


def test_scores_that_are_not_finite_are_an_error_that_names_them_all():
    bad = {"w2": score(np.nan), "mmd2": score(1.0, [1.0, np.inf]), "energy": score(1.0, [1.0, 1.0])}
    with pytest.raises(FloatingPointError, match=r"scores of scVI .* w2 is nan; mmd2 is not finite in resamples"):
        checked(bad, "scVI")


def test_every_score_of_a_comparison_has_an_interval_that_its_seed_decides():
    real, candidate, reference = cells(100, 1), cells(100, 2), cells(200, 3)
    first, again = (comparison(real, reference).all_scores({"c": candidate})["c"].scores for _ in range(2))
    assert {name for name, s in first.items() if s.half_width is None} == set()
    assert all(s.half_width == again[name].half_width for name, s in first.items())
    for name, s in first.items():
        low, high = s.interval
        assert low <= s.value <= high, name


def test_values_are_those_of_the_plain_functions():
    real, candidate, reference = cells(90, 1), cells(90, 2, scale=2), cells(200, 3)
    c = comparison(real, reference)
    scores = c.scores(candidate).scores
    x, y = (c.space.project(s.counts) for s in (real, candidate))
    for name, plain in (
        ("mmd2", d.mmd2_rbf), ("mmd2_median", d.mmd2_median), ("energy", d.energy_distance),
        ("frechet", d.frechet_distance), ("w2", lambda a, b: d.matched(a, b, power=2, points=90)),
    ):  # fmt: skip
        assert scores[name].value == pytest.approx(plain(x, y), rel=1e-9), name
