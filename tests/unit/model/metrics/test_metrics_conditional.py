"""Scores within classes, fold changes, gene-gene correlations, copies."""

import numpy as np
import pytest
import scipy.sparse as sp
from helpers.models.metric_cells import cells, comparison

from scldm.metrics.baselines import shuffled
from scldm.metrics.cell_set import CLASSES, CellSet, class_text
from scldm.metrics.conditional import class_averages
from scldm.metrics.distribution import distances as d
from scldm.metrics.distribution.memorisation import NearestTraining, distance_ratio, share_too_near
from scldm.metrics.genes.fold_change import cp10k, log_fold_change, recovery
from scldm.metrics.genes.gene_correlation import correlation_agreement, correlation_matrix


def with_days(n, seed, **changes):
    """Two types on two days; 70 % of the cells are of day one. A day adds to five genes."""
    base = cells(n, seed, **changes)
    day = np.where(np.arange(n) % 10 < 7, "one", "two").astype(object)
    counts = base.counts.toarray()
    counts[day == "two", 5:10] += 4
    return CellSet(sp.csr_matrix(counts), {**base.labels, "day": day})


@pytest.fixture(scope="module")
def compared():
    real, candidate, reference = with_days(200, 1), with_days(200, 2, scale=3), with_days(400, 3)
    c = comparison(real, reference, labels=("type", "day"), min_cells=40)
    return c, real, candidate, c.all_scores({"candidate": candidate})["candidate"]


def test_a_class_is_scored_by_the_plain_functions_on_its_own_cells(compared):
    c, real, candidate, found = compared
    x, y = (c.space.project(s.counts)[s.labels["type"] == "odd"] for s in (real, candidate))
    values = found.classes["type"].classes["odd"].values
    assert values["mmd2"][0] == pytest.approx(d.mmd2_rbf(x, y))
    assert values["frechet"][0] == pytest.approx(d.frechet_distance(x, y))
    assert values["energy"][0] == pytest.approx(d.energy_distance(x, y))
    assert values["w2"][0] == pytest.approx(d.matched(x, y, power=2, points=150))
    assert len(values["w2"]) == 1 + c.settings.refits


def test_means_are_weighted_by_real_cells_or_every_class_alike(compared):
    _, _, _, found = compared
    classes = found.classes["day"].classes
    assert {k: v.n_real for k, v in classes.items()} == {"one": 140, "two": 60}
    one, two = (classes[k].values["w2"][0] for k in ("one", "two"))
    assert found.scores["conditional_w2.day"].value == pytest.approx(0.7 * one + 0.3 * two)
    alike = class_averages({"candidate": found.classes}, "classes")["candidate"]
    assert alike["conditional_w2.day"].value == pytest.approx((one + two) / 2)


def test_labels_are_combined_and_small_classes_are_listed_by_name(compared):
    _, _, _, found = compared
    joint = found.classes["type+day"]
    assert set(joint.classes) == {CLASSES.join(k) for k in (("even", "one"), ("odd", "one"), ("odd", "two"))}
    assert {class_text(k): v for k, v in joint.left_out.items()} == {"even + two": (20, 20)}
    assert "conditional_w2.type+day" in found.scores


def test_averages_are_over_the_classes_that_all_candidates_have(compared):
    c, _, candidate, found = compared
    only_even = candidate[candidate.labels["type"] == "even"]
    both = c.all_scores({"candidate": candidate, "only even": only_even})
    even = both["candidate"].classes["type"].classes["even"].values["w2"][0]
    assert both["candidate"].scores["conditional_w2.type"].value == pytest.approx(even)
    assert both["only even"].classes["type"].left_out == {"odd": (100, 0)}
    assert found.scores["conditional_w2.type"].value != pytest.approx(even)


def test_cells_that_carry_each_others_labels_are_seen_within_classes_only():
    real, candidate, reference = cells(200, 1), cells(200, 2), cells(300, 3)
    swapped = CellSet(
        candidate.counts, {"type": np.where(candidate.labels["type"] == "odd", "even", "odd").astype(object)}
    )
    found = comparison(real, reference).all_scores({"right": candidate, "swapped": swapped})
    right, wrong = (found[name].scores for name in ("right", "swapped"))
    assert wrong["w2"].value == pytest.approx(right["w2"].value, rel=0.1)
    assert wrong["conditional_w2.type"].value > 1.5 * right["conditional_w2.type"].value
    assert wrong["conditional_lfc_pearson.type"].value < -0.9
    assert wrong["label_logistic_accuracy.type"].value < 0.1 < 0.9 < right["label_logistic_accuracy.type"].value


def test_fold_changes_are_those_of_numpy(compared):
    c, real, candidate, found = compared
    lfc = []
    for side in (real, candidate):
        dense = side.counts.toarray().astype(float)
        x = (dense / dense.sum(1, keepdims=True) * 1e4)[:, c.space.genes]
        inside = side.labels["day"] == "two"
        lfc.append(np.log2((x[inside].mean(0) + 1) / (x[~inside].mean(0) + 1)))
    values = found.classes["day"].classes["two"].values
    assert values["lfc_pearson"][0] == pytest.approx(np.corrcoef(*lfc)[0, 1])
    assert values["lfc_slope"][0] == pytest.approx(np.polyfit(*lfc, 1)[0])


def test_training_cells_of_a_control_take_the_place_of_the_rest_within_the_other_labels():
    real, reference = with_days(200, 1), with_days(300, 3)
    c = comparison(real, reference, labels=("type", "day"), min_cells=20, control={"day": "one"})
    classes = c.scores(with_days(200, 2)).classes
    key = CLASSES.join(("even", "two"))
    assert "lfc_slope" not in classes["day"].classes["one"].values
    dense = [cp10k(m.counts, c.space.genes).toarray() for m in (real, with_days(200, 2), reference)]
    chosen = [(m.labels["type"] == "even") & (m.labels["day"] == "two") for m in (real, with_days(200, 2))]
    control = (reference.labels["type"] == "even") & (reference.labels["day"] == "one")
    lfc = [log_fold_change(m[rows].mean(0), dense[2][control].mean(0)) for m, rows in zip(dense, chosen, strict=False)]
    assert classes["type+day"].classes[key].values["lfc_slope"][0] == pytest.approx(recovery(*lfc)[1])


def test_halved_effects_have_a_slope_of_a_half_and_no_effects_recover_nothing():
    real = np.random.default_rng(0).normal(size=100)
    assert recovery(real, 0.5 * real + 3) == pytest.approx((1.0, 0.5))
    assert recovery(real, np.zeros(100)) == (0.0, 0.0)
    with pytest.raises(ValueError, match="all equal"):
        recovery(np.ones(5), real[:5])


def test_gene_correlations_are_those_of_numpy_and_a_constant_gene_moves_with_none():
    x = np.random.default_rng(0).normal(size=(50, 4))
    np.testing.assert_allclose(correlation_matrix(x), np.corrcoef(x.T))
    x[:, 1] = 0.1
    assert correlation_matrix(x)[1].tolist() == [0, 0, 0, 0]
    assert correlation_agreement(np.random.default_rng(1).normal(size=(50, 4)), np.zeros((50, 4)))[0] == 0


def test_shuffled_genes_keep_marginals_and_lose_their_correlations():
    real, reference = cells(300, 1), cells(400, 2)
    floor, drawn = cells(300, 3), cells(300, 4)
    broken = CellSet(shuffled(drawn.counts, np.full(300, "all"), np.random.default_rng(0)), drawn.labels)
    found = comparison(real, reference).all_scores({"floor": floor, "shuffled": broken})
    a, b = found["floor"].scores, found["shuffled"].scores
    assert a["gene_correlation_pearson"].value > 0.8 > 0.3 > abs(b["gene_correlation_pearson"].value)
    assert b["gene_correlation_difference"].value > 2 * a["gene_correlation_difference"].value
    assert b["zero_fraction_difference"].value < 0.02


def test_copies_of_training_cells_are_detected_though_distances_are_at_the_floor():
    real, reference, fresh = cells(200, 1), cells(400, 2), cells(200, 3)
    copies = reference[np.random.default_rng(0).permutation(400)[:200]]
    found = comparison(real, reference).all_scores({"fresh": fresh, "copies": copies})
    fresh, copies = (found[name].scores for name in ("fresh", "copies"))
    assert copies["w2"].value < 1.1 * fresh["w2"].value
    assert copies["memorisation_share"].value == 1
    assert copies["memorisation_ratio"].value < 1e-6
    assert fresh["memorisation_share"].value < 0.05
    assert fresh["memorisation_ratio"].value == pytest.approx(1, abs=0.1)


def test_nearest_training_cell_by_brute_force():
    train, points = np.random.default_rng(0).normal(size=(2, 30, 4))
    brute = np.linalg.norm(points[:, None] - train, axis=-1).min(1)
    np.testing.assert_allclose(NearestTraining(train).distances(points), brute)
    real = np.arange(1.0, 101)
    assert share_too_near(real, np.array([0.5, 1.0, 2.5, 3.0])) == 0.5  # the 1st percentile is 1.99
    assert distance_ratio(real, real / 2) == 0.5
    with pytest.raises(ValueError, match="the split leaks"):
        distance_ratio(np.zeros(4), real)
