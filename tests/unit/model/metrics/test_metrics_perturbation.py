"""Free answers and measures of combinations that nobody measured."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import ranksums

from scldm.errors import InputError
from scldm.metrics.distribution.distances import energy_distance
from scldm.metrics.distribution.projection import RealSpace
from scldm.metrics.genes.expression import log1p_cp10k
from scldm.metrics.perturbation import free_answers as free
from scldm.metrics.perturbation.combinations import FLOOR, CombinationJudge, _weights
from scldm.metrics.perturbation.free_answers import FREE_ANSWERS, Answer, free_answers
from scldm.metrics.perturbation.measures import (
    Change,
    distances,
    pearson,
    rank_sum_p_values,
    ranks,
    resampled_energies,
    shift_scores,
)
from scldm.metrics.perturbation.screen import Screen
from scldm.metrics.perturbation.shift import shares

GENES, CELLS = 60, 80
CONTEXTS, TREATMENTS = ("a", "b", "c"), ("ctrl", "drug", "other")


@pytest.fixture(scope="module")
def profiles() -> dict[tuple[str, str], np.ndarray]:
    """Shares of genes: every context has a profile, and a treatment multiplies all of them alike."""
    rng = np.random.default_rng(0)
    effect = {"ctrl": np.zeros(GENES), "drug": rng.normal(0, 1, GENES), "other": rng.normal(0, 1, GENES)}
    found = {}
    for context in CONTEXTS:
        base = rng.normal(0, 0.7, GENES)
        for treatment in TREATMENTS:
            share = np.exp(base + effect[treatment])
            found[context, treatment] = share / share.sum()
    return found


def drawn(profiles: dict[tuple[str, str], np.ndarray], seed: int) -> Screen:
    rng = np.random.default_rng(seed)
    pairs = [pair for pair in profiles for _ in range(CELLS)]
    size = rng.integers(300, 600, len(pairs))
    counts = rng.poisson(np.stack([profiles[p] for p in pairs]) * size[:, None])
    context, treatment = (np.array(x) for x in zip(*pairs, strict=True))
    return Screen(sp.csr_matrix(counts.astype(float)), context, treatment, "ctrl")


@pytest.fixture(scope="module")
def screen(profiles: dict[tuple[str, str], np.ndarray]) -> Screen:
    return drawn(profiles, 1)


@pytest.fixture(scope="module")
def known(screen: Screen) -> Screen:
    """Return the screen without c + drug."""
    return screen[np.setdiff1d(np.arange(len(screen.context)), screen.members["c", "drug"])]


def test_no_free_answer_is_given_when_the_combination_is_among_the_measured_cells(screen: Screen) -> None:
    with pytest.raises(ValueError, match="would know the question"):
        free_answers(screen, "c", "drug", np.random.default_rng(0))


def test_a_context_without_controls_is_an_error_that_names_it(known: Screen) -> None:
    less = known[np.setdiff1d(np.arange(len(known.context)), known.members["c", "ctrl"])]
    with pytest.raises(InputError, match="no cell of 'c' was measured under 'ctrl'"):
        free_answers(less, "c", "drug", np.random.default_rng(0))


def test_a_treatment_that_no_other_context_had_is_an_error(known: Screen) -> None:
    rows = np.flatnonzero((known.context == "c") | (known.treatment != "drug"))
    with pytest.raises(InputError, match="in no context but 'c'"):
        free_answers(known[rows], "c", "drug", np.random.default_rng(0))


def test_a_screen_without_its_control_is_an_error_that_offers_the_treatments() -> None:
    with pytest.raises(InputError, match=r"no cell has the control treatment 'PBS'.*ctrl"):
        Screen(sp.csr_matrix(np.ones((2, 3))), np.array(["a", "b"]), np.array(["ctrl", "drug"]), "PBS")


def test_the_shift_is_the_mean_shift_of_the_other_contexts(known: Screen) -> None:
    answer = free_answers(known, "c", "drug", np.random.default_rng(0))[free.SHIFT]
    control = log1p_cp10k(known.cells("c", "ctrl")).toarray()
    shift = np.mean([known.mean(c, "drug") - known.mean(c, "ctrl") for c in ("a", "b")], axis=0)
    np.testing.assert_allclose(answer.log, np.maximum(control + shift, 0))
    assert answer.counts is None


@pytest.mark.parametrize("name", [free.COUNTS, free.NB])
def test_answers_in_counts_have_the_mean_that_their_formula_says(known: Screen, name: str) -> None:
    answer = free_answers(known, "c", "drug", np.random.default_rng(0))[name]
    assert answer.counts is not None
    got = np.asarray(answer.counts.sum(0)).ravel() / CELLS
    mean = {p: shares(known, *p) for p in [(c, t) for c in "abc" for t in ("ctrl", "drug") if c + t != "cdrug"]}
    control = known.cells("c", "ctrl")
    size = np.asarray(control.sum(1)).ravel().mean()
    ratio = np.exp(np.mean([np.log(mean[c, "drug"] / mean[c, "ctrl"]) for c in "ab"], axis=0))
    if name == free.COUNTS:
        rise = np.mean([mean[c, "drug"] - mean[c, "ctrl"] for c in "ab"], axis=0)
        base = np.asarray(control.mean(0)).ravel()
        expected = np.where(rise > 0, base + rise * size, base * np.minimum(ratio, 1))
    else:
        profile = np.asarray(control.sum(0)).ravel() / control.sum() * ratio
        expected = profile / profile.sum() * size
    assert np.abs(got - expected).max() < 5 * np.sqrt(expected.max() / CELLS)
    assert pearson(got, expected) > 0.995
    assert (answer.counts.data == np.round(answer.counts.data)).all()


def test_the_nearest_context_is_the_one_whose_controls_are_nearest(known: Screen) -> None:
    answer = free_answers(known, "c", "drug", np.random.default_rng(0))[free.NEAREST]
    own = known.mean("c", "ctrl")
    nearest = min("ab", key=lambda c: float(np.linalg.norm(known.mean(c, "ctrl") - own)))
    assert answer.counts is not None
    assert (answer.counts != known.cells(nearest, "drug")).nnz == 0


def test_the_linear_model_finds_a_shift_that_follows_from_the_profile() -> None:
    """Contexts lie on a line, and the treatment's effect grows along it: the mean shift is wrong at its end."""
    rng = np.random.default_rng(0)
    base, along, effect = rng.normal(0, 1, GENES), rng.normal(0, 0.5, GENES), rng.normal(0, 0.7, GENES)
    places = np.linspace(-1, 1, 9)
    profiles = {}
    for i, s in enumerate(places):
        for t, on in (("ctrl", 0.0), ("drug", 1.0)):
            share = np.exp(base + s * along + on * (1 + s) * effect)
            profiles[f"{i}", t] = share / share.sum()
    screen = drawn(profiles, 3)
    known = screen[np.setdiff1d(np.arange(len(screen.context)), screen.members["8", "drug"])]
    answers = free_answers(known, "8", "drug", np.random.default_rng(0))
    real, control = (log1p_cp10k(screen.cells("8", t)).toarray() for t in ("drug", "ctrl"))
    error = {n: np.abs(real.mean(0) - answers[n].log.mean(0)).mean() for n in (free.SHIFT, free.LINEAR, free.CONTROL)}
    assert error[free.LINEAR] < 0.8 * error[free.SHIFT] < 0.8 * error[free.CONTROL]
    assert np.abs(control.mean(0) - real.mean(0)).mean() == pytest.approx(error[free.CONTROL])


def test_p_values_are_those_of_scipy_for_each_gene() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.poisson(1.0, (30, 5)).astype(float), rng.poisson(1.5, (40, 5)).astype(float)
    x[:, 2] = y[0, 2] = 0
    y[:, 2] = 0
    found = rank_sum_p_values(x, y)
    assert found[2] == 1
    continuous = rng.normal(size=(30, 1)), rng.normal(size=(40, 1)) + 1
    assert rank_sum_p_values(*continuous)[0] == pytest.approx(ranksums(*continuous).pvalue[0], rel=0.1)
    assert ((found > 0) & (found <= 1)).all()


def test_measured_cells_score_best_against_themselves(screen: Screen) -> None:
    real, control = (log1p_cp10k(screen.cells("c", t)).toarray() for t in ("drug", "ctrl"))
    change = Change.of(real, control)
    scores = shift_scores(change, change)
    assert scores["delta_pearson"] == pytest.approx(1)
    assert scores["delta_pearson_top20"] == pytest.approx(1)
    assert scores["lfc_slope"] == pytest.approx(1)
    assert scores["mae"] == 0
    assert scores["pr_auc"] == pytest.approx(1)
    assert scores["des"] == 1
    nothing = shift_scores(change, Change.of(control, control))
    assert nothing["delta_pearson"] == 0
    assert nothing["des"] == 0
    assert nothing["lfc_slope"] == pytest.approx(0)


def test_an_answer_that_calls_every_gene_is_judged_by_its_largest_changes() -> None:
    genes = np.arange(10.0)
    real = Change(genes, genes, np.array([1.0] * 7 + [1e-9] * 3))
    loud = Change(genes, genes, np.full(10, 1e-9))
    wrong = Change(genes, genes[::-1].copy(), np.full(10, 1e-9))
    assert shift_scores(real, loud)["des"] == 1
    assert shift_scores(real, wrong)["des"] == 0


def test_the_rank_counts_the_treatments_that_are_nearer(screen: Screen) -> None:
    measured = {t: screen.mean("a", t) - screen.mean("a", "ctrl") for t in ("drug", "other")}
    assert ranks(measured["drug"], measured, "drug") == {"rank": 0, "pds": 1}
    assert ranks(measured["other"], measured, "drug") == {"rank": 1, "pds": 0}
    assert ranks(measured["drug"], {"drug": measured["drug"]}, "drug") == {}


def test_answers_are_scored_beside_the_floor_with_intervals_that_hold_their_values(
    screen: Screen, known: Screen
) -> None:
    space = RealSpace.fit(known.counts, n_top_genes=GENES, n_pcs=10, seed=0)
    judge = CombinationJudge(known, {("c", "drug"): screen.cells("c", "drug")}, space, seed=0)
    answers = free_answers(known, "c", "drug", np.random.default_rng(0))
    found = judge.score(("c", "drug"), answers)
    assert set(found.scores) == {*FREE_ANSWERS, FLOOR}
    assert found.sources == ("a", "b")
    assert (found.n_measured, found.n_control) == (CELLS, CELLS)
    for name, scores in found.scores.items():
        for metric, interval in found.intervals[name].items():
            slack = 0.15 * abs(scores[metric]) + 0.02  # resampled means are noisier than the mean
            assert interval.low - slack <= scores[metric] <= interval.high + slack, (name, metric)
    energy = {name: scores["energy"] for name, scores in found.scores.items()}
    assert energy[FLOOR] < min(energy[n] for n in FREE_ANSWERS)
    assert energy[free.NB] < energy[free.CONTROL]
    again = judge.score(("c", "drug"), answers)
    assert (again.scores, again.intervals) == (found.scores, found.intervals)


def test_too_few_measured_cells_are_refused(screen: Screen, known: Screen) -> None:
    space = RealSpace.fit(known.counts, n_top_genes=GENES, n_pcs=10, seed=0)
    judge = CombinationJudge(known, {("c", "drug"): screen.cells("c", "drug")[:9]}, space, seed=0)
    with pytest.raises(ValueError, match="9 measured cells are fewer than 10"):
        judge.score(("c", "drug"), {})


def test_distances_do_not_depend_on_the_number_of_cells() -> None:
    rng = np.random.default_rng(0)
    for shift, expected in ((0.0, 0.0), (1.0, None)):
        few, many = (
            np.mean([distances(rng.normal(size=(n, 3)), rng.normal(shift, 1, (n, 3)))["energy"] for _ in range(40)])
            for n in (15, 150)
        )
        assert few == pytest.approx(many if expected is None else expected, abs=0.12)
        assert many == pytest.approx(many if expected is None else expected, abs=0.02)


def test_the_energy_is_the_usual_one_but_for_the_distances_of_cells_to_themselves() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), rng.normal(0.5, 1, (70, 3))
    inside = [np.linalg.norm(z[:, None] - z, axis=2).mean() / (len(z) - 1) for z in (x, y)]
    assert distances(x, y)["energy"] == pytest.approx(energy_distance(x, y) - sum(inside))


def test_resampled_energies_are_centred_on_the_energy() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), rng.normal(0.5, 1, (70, 3))
    weights = [np.concatenate([_weights(len(z), rng) for _ in range(20)]) for z in (x, y)]
    assert resampled_energies(x, y, *weights).mean() == pytest.approx(distances(x, y)["energy"], abs=0.01)


def test_an_answer_of_counts_has_their_log_values(known: Screen) -> None:
    counts = known.cells("a", "drug")
    np.testing.assert_allclose(Answer.of(counts).log, log1p_cp10k(counts).toarray())
