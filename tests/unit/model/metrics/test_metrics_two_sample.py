"""Two-sample scores and label agreement against brute force."""

import numpy as np
import pytest

from scldm.metrics.distribution import two_sample as t
from scldm.metrics.labels import LabelJudges, label_agreement

RNG = np.random.default_rng


def test_precision_recall_density_coverage_by_brute_force():
    real, generated = RNG(0).normal(size=(60, 3)), RNG(1).normal(size=(45, 3)) * 1.4
    k = 4
    dist = lambda a, b: np.linalg.norm(a[:, None] - b, axis=-1)  # noqa: E731
    radius_real = np.sort(dist(real, real), 1)[:, k]  # column 0 is the point itself
    radius_generated = np.sort(dist(generated, generated), 1)[:, k]
    cross = dist(real, generated)
    in_real, in_generated = cross < radius_real[:, None], cross < radius_generated
    m = t.manifold_metrics(real, generated, k=k)
    assert m.precision == pytest.approx(in_real.any(0).mean())
    assert m.recall == pytest.approx(in_generated.any(1).mean())
    assert m.density == pytest.approx(in_real.sum(0).mean() / k)
    assert m.coverage == pytest.approx((cross.min(1) < radius_real).mean())


def test_a_collapsed_generator_is_precise_but_recalls_nothing():
    real = RNG(0).normal(size=(200, 2))
    m = t.manifold_metrics(real, RNG(1).normal(size=(200, 2)) * 0.01)
    assert m.precision == 1
    assert m.recall < 0.05
    assert m.coverage < 0.2


def test_auroc_is_half_for_equal_and_one_for_separate_clouds():
    real, same = RNG(0).normal(size=(2, 400, 3))
    assert t.classifier_auroc(real, same, seed=0) == pytest.approx(0.5, abs=0.06)
    assert t.classifier_auroc(real, same + 20, seed=0) == 1


def test_one_nn_sees_equal_separate_and_copied_cells():
    real, same = RNG(0).normal(size=(2, 400, 3))
    assert t.nearest_neighbor_accuracy(real, same) == pytest.approx(0.5, abs=0.06)
    assert t.nearest_neighbor_accuracy(real, same + 20) == 1
    assert t.nearest_neighbor_accuracy(real, real + 1e-9) == 0


def test_label_agreement_counts_by_class_and_leaves_unlabelled_cells_out():
    train = np.concatenate([RNG(0).normal(size=(20, 2)), RNG(1).normal(size=(20, 2)) + 50])
    train_labels = np.array(["a"] * 20 + ["b"] * 20, dtype=object)
    points = np.array([[0, 0], [0, 1], [50, 50], [50, 51], [50, 50]], dtype=float)
    labels = np.array(["a", "b", "b", "b", None], dtype=object)
    agreement = label_agreement(train, train_labels, points, labels, n_neighbors=3)
    assert agreement.accuracy == 0.75
    assert agreement.per_class == {"a": 1.0, "b": pytest.approx(2 / 3)}
    assert agreement.macro_accuracy == pytest.approx(5 / 6)
    assert agreement.chance == 0.75
    assert (agreement.n_cells, agreement.n_unlabelled) == (4, 1)
    assert agreement.confusion.tolist() == [[1, 0], [1, 2]]


def test_a_class_unseen_in_training_is_never_recovered():
    train, labels = RNG(0).normal(size=(9, 2)), np.array(["a"] * 9, dtype=object)
    agreement = label_agreement(train, labels, train[:2], np.array(["a", "new"], dtype=object), n_neighbors=3)
    assert agreement.per_class == {"a": 1.0, "new": 0.0}


def test_both_classifiers_are_those_of_scikit_learn_and_score_every_half():
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    train, points = RNG(0).normal(size=(90, 3)), RNG(1).normal(size=(40, 3))
    classes = np.array(["a", "b", "c"], dtype=object)
    train_labels, labels = classes[(train[:, 0] > 0).astype(int) + (train[:, 1] > 1)], classes[np.arange(40) % 3]
    weights = RNG(2).random((7, 40))
    scores = LabelJudges(train, {"kind": train_labels}, n_neighbors=5).scores(points, {"kind": labels}, weights)
    scaled = (train - train.mean(0)) / train.std(0), (points - train.mean(0)) / train.std(0)
    for prefix, model, x, y in (
        ("label", KNeighborsClassifier(5), train, points),
        ("label_logistic", LogisticRegression(max_iter=500), *scaled),
    ):
        right = model.fit(x, train_labels.astype(str)).predict(y) == labels
        score = scores[f"{prefix}_accuracy.kind"]
        assert score.value == pytest.approx(right.mean())
        np.testing.assert_allclose(score.replicates, weights @ right / weights.sum(1))
        recalls = [np.average(right[labels == c], weights=weights[0, labels == c]) for c in classes]
        assert scores[f"{prefix}_macro_accuracy.kind"].replicates[0] == pytest.approx(np.mean(recalls))


def test_a_label_that_no_cell_has_gets_no_score():
    judges = LabelJudges(RNG(0).normal(size=(20, 2)), {"kind": np.array(["a", "b"] * 10, dtype=object)}, n_neighbors=3)
    assert judges.scores(np.zeros((2, 2)), {"kind": np.array([None, None])}) == {}
