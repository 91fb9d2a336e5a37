"""What values of labels are called, how they are saved, and what is said of those that no training cell has."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.models.label_values import number, sets, vectors
from helpers.models.small_models import CELL_TYPES, vocabulary

from scldm.data.labels.values import number_text
from scldm.data.labels.vectors import FILE
from scldm.data.vocabulary import UnknownNameError, Vocabulary
from scldm.errors import CheckpointError

ALL = (CELL_TYPES, number(unit="uM", scale="log"), sets(), vectors(zero=["ctrl"]))


@pytest.mark.parametrize(
    ("name", "text"), [("1e1", "10"), ("10.0", "10"), (" 2.50 ", "2.5"), ("-0", "0"), ("1e-3", "0.001")]
)
def test_a_number_has_one_text(name, text):
    assert number_text(name) == text


def test_vocabularies_without_values_are_saved_as_before():
    assert set(json.loads(vocabulary(CELL_TYPES).to_json())) == {"feature_ids", "feature_names", "labels"}


def test_values_are_read_as_they_were_saved(tmp_path):
    names = vocabulary(*ALL)
    names.save(tmp_path / "vocabulary.json")
    again = Vocabulary.load(tmp_path / "vocabulary.json")
    assert again == names
    assert again.digest == names.digest
    for label in again.labels[1:]:
        own = names.label(label.name)
        np.testing.assert_array_equal(label.values.features(label.classes), own.values.features(own.classes))


def test_vectors_that_are_not_those_of_the_vocabulary_are_refused(tmp_path):
    names = vocabulary(vectors())
    names.save(tmp_path / "vocabulary.json")
    (tmp_path / "other").mkdir()
    vocabulary(vectors(seed=1)).save(tmp_path / "other" / "vocabulary.json")
    (tmp_path / FILE).write_bytes((tmp_path / "other" / FILE).read_bytes())
    with pytest.raises(CheckpointError, match="does not hold the vectors of the label 'gene'"):
        Vocabulary.load(tmp_path / "vocabulary.json").label("gene").values.features(["A"])
    (tmp_path / FILE).unlink()
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        Vocabulary.load(tmp_path / "vocabulary.json").label("gene").values.features(["A"])


def test_asked_classes_come_last_and_are_not_saved():
    names = vocabulary(*ALL)
    more = names.extended(
        [{"cell_type": "T", "dose": "2.5", "drugs": "A+C", "gene": "D"}, {"dose": "3", "drugs": None}]
    )
    assert more.label("dose").classes == ("1", "3", "10", "2.5")
    assert more.label("dose").null_id == 4
    assert more.label("gene").measured == names.label("gene").classes
    assert more.digest == names.digest
    assert names.extended([{"dose": "3", "gene": "ctrl"}]) is names


def test_whole_numbers_with_others_among_them_become_a_column_of_floats():
    label = number().extended(["2.5"])
    ids = label.encode(["1", "2.5"])
    assert label.column(ids, used=ids).tolist() == [1.0, 2.5]
    assert label.column(ids[:1], used=ids[:1]).dtype == np.int64


@pytest.mark.parametrize(
    ("label", "name", "text"),
    [(number(), "7.0", "7"), (sets(), "C+A", "A+C"), (vectors(), " E ", "E"), (vectors(zero=["ctrl"]), "ctrl", "ctrl")],
)
def test_values_that_no_cell_has_can_be_asked_for(label, name, text):
    assert label.asked(name) == text


@pytest.mark.parametrize(
    ("label", "name", "message"),
    [
        (number(), "high", "dose: 'high' is no number"),
        (number(), "inf", "dose: 'inf' is no number"),
        (number(scale="log"), "-1", "dose: -1 has no logarithm"),
        (sets(), "A+Z", "drugs: the model knows no member 'Z'"),
        (sets(), "A++B", "has an empty member"),
        (vectors(), "Z", "gene: the model's table has no vector of 'Z'"),
        (CELL_TYPES, "X", "cell_type has no class 'X'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_with_the_reason(label, name, message):
    with pytest.raises(UnknownNameError, match=message):
        label.asked(name)


@pytest.mark.parametrize(
    ("label", "name", "note"),
    [
        (number(unit="uM"), "3", None),
        (number(unit="uM"), "30", "dose 30 uM is above the largest of the training cells, 10 uM: extrapolated."),
        (number(unit="uM"), "0.5", "dose 0.5 uM is below the smallest of the training cells, 1 uM: extrapolated."),
        (number(), "2", "dose 2 has no training cells: interpolated between 1 and 3."),
        (sets(), "A+C", "drugs A+C has no training cells: composed of its members, which other training cells have."),
        (vectors(), "A", None),
    ],
)
def test_notes_say_how_far_a_value_is_from_those_of_the_training_cells(label, name, note):
    assert label.values.note(label.name, name) == note


def test_a_column_that_does_not_differ_between_measured_names_is_left_out():
    label = vectors()
    table = label.values.table
    assert table.width == 2  # three names, less their mean
    assert 0 <= table.outside.min() <= table.outside.max() <= 1
    np.testing.assert_allclose(table.outside[:3], 0, atol=1e-6)
