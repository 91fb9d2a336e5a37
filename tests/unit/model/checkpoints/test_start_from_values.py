"""A flow that starts from another one takes over the labels of values that mean the same, and refuses others."""

from __future__ import annotations

import pytest
import torch
from helpers.models.label_values import number, sets, vectors
from helpers.models.small_models import CELL_TYPES, GENES, random_weights, write_flow

from scldm.checkpoints.native import load_flow, new_dit
from scldm.checkpoints.start_from import start_flow
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.errors import CheckpointError


def flow_of(folder, *labels: LabelVocabulary):
    return load_flow(write_flow(folder, *labels))


def new_flow(like, *labels: LabelVocabulary):
    torch.manual_seed(7)
    vocabulary = Vocabulary(GENES, GENES, labels)
    dit = random_weights(new_dit(like.dit.config, vocabulary, latent_shape=(3, 4)), seed=9)
    return dit, vocabulary


def points(n: int = 4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 4, generator=g), torch.rand(n, generator=g)


@pytest.mark.parametrize("label", [number(), sets(), vectors(zero=["ctrl"])], ids=lambda x: x.name)
def test_a_label_of_the_same_values_is_taken_over_whole(tmp_path, label):
    source = flow_of(tmp_path / "flow", CELL_TYPES, label)
    dit, vocabulary = new_flow(source, label, CELL_TYPES)
    started = start_flow(dit, vocabulary, source)
    x, t = points()
    ids = {label.name: torch.tensor([0, 1, 2, label.null_id]), "cell_type": torch.tensor([0, 1, 2, 3])}
    torch.testing.assert_close(dit(x, t, ids), source.dit(x, t, ids))
    assert started.new == started.dropped == []


def test_members_of_sets_are_matched_by_name_and_a_new_one_adds_nothing(tmp_path):
    source = flow_of(tmp_path / "flow", sets(classes=("A", "B", "C")))
    label = sets(classes=("A", "A+Z", "C"))
    dit, vocabulary = new_flow(source, label)
    started = start_flow(dit, vocabulary, source)
    x, t = points(3)
    ours, theirs = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 2])  # A, A+Z, C
    torch.testing.assert_close(dit(x, t, {"drugs": ours}), source.dit(x, t, {"drugs": theirs}))
    assert started.classes["drugs"] == {"kept": 2, "new": ["Z"], "dropped": ["B"], "parents": {}}


def test_a_new_label_of_values_adds_nothing_at_first(tmp_path):
    source = flow_of(tmp_path / "flow", CELL_TYPES)
    for label in (number(), sets(), vectors()):
        dit, vocabulary = new_flow(source, CELL_TYPES, label)
        start_flow(dit, vocabulary, source)
        x, t = points()
        ids = {"cell_type": torch.tensor([0, 1, 2, 3])}
        both = {**ids, label.name: torch.tensor([0, 1, 2, label.null_id])}
        torch.testing.assert_close(dit(x, t, both), source.dit(x, t, ids))


def test_without_a_label_of_values_the_network_does_what_it_did_for_cells_without_it(tmp_path):
    source = flow_of(tmp_path / "flow", CELL_TYPES, number(), sets())
    dit, vocabulary = new_flow(source, CELL_TYPES)
    started = start_flow(dit, vocabulary, source)
    x, t = points()
    ids = {"cell_type": torch.tensor([0, 1, 2, 3])}
    torch.testing.assert_close(dit(x, t, ids), source.dit(x, t, ids))
    assert {n.split(".")[1] for n in started.dropped} == {"label_dose", "label_drugs"}


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (number(), LabelVocabulary("dose", ("1", "3", "10")), "label dose is classes in the data and a number in the"),
        (sets("dose"), number(), "label dose is a number in the data and a set in the model"),
        (number(), number(classes=("1", "3", "30")), "a number of the data and of the model differ in mean, sd"),
        (number(), number(scale="log"), "differ in mean, sd, scale"),
        (vectors(), vectors(seed=1), "names with vectors of the data and of the model differ in digest"),
        (vectors(), vectors(width=2, measured=("A", "B")), "differ in names, width, digest"),
        (sets(), sets(zero=["C"]), "names an untreated control"),
    ],
)
def test_a_label_that_means_something_else_is_refused(tmp_path, theirs, ours, message):
    source = flow_of(tmp_path / "flow", theirs)
    dit, vocabulary = new_flow(source, ours)
    with pytest.raises(CheckpointError, match=message):
        start_flow(dit, vocabulary, source)


def test_values_have_no_parents(tmp_path):
    source = flow_of(tmp_path / "flow", number())
    dit, vocabulary = new_flow(source, number())
    with pytest.raises(CheckpointError, match=r"parents.dose: its classes are values"):
        start_flow(dit, vocabulary, source, parents={"dose": {"10": "3"}})
