"""The name of a class does not depend on the type that a reader left it in."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from scldm.data.class_names import class_name, class_names, near_duplicates


@pytest.mark.parametrize("one", [1, 1.0, np.int64(1), np.uint8(1), np.float32(1.0), np.float16(1), Decimal("1.0"), "1"])
def test_a_whole_number_has_one_name(one):
    assert class_name(one) == "1"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (True, "True"), (np.bool_(False), "False"), (0.5, "0.5"), (np.float32(0.1), "0.1"), (-0.0, "0"),
        (float(np.float32(0.1)), "0.1"), (0.1, "0.1"), (1 / 3, "0.3333333333333333"), (float("inf"), "inf"),
        (10**20, "1" + "0" * 20), (1e20, "1" + "0" * 20), (b"B cell", "B cell"),
        (pd.Timestamp("2020-01-02"), "2020-01-02"),
    ],
)  # fmt: skip
def test_other_values_have_the_shortest_text(value, name):
    assert class_name(value) == name


@pytest.mark.parametrize("text", ["001", "1.0", "None", "nan", "NA", " B", "True"])
def test_text_stays_as_it_is(text):
    assert class_name(text) == text


@pytest.mark.parametrize("value", [None, np.nan, pd.NA, pd.NaT, "", np.float32("nan")])
def test_nulls_and_empty_text_are_no_class(value):
    assert class_name(value) is None


@pytest.mark.parametrize(
    "column",
    [
        pd.Series([0, 1, 2, 1]), pd.Series([0.0, 1.0, 2.0, 1.0]), pd.Series(["0", "1", "2", "1"]),
        pd.Series(["0", 1.0, 2, "1"], dtype=object), pd.Series([0, 1, 2, 1], dtype="category"),
        pd.Series([0.0, 1.0, 2.0, 1.0], dtype="category"), pd.Series([0, 1, 2, 1], dtype="Int64"),
        pd.Series(["0", "1", "2", "1"], dtype="string"), np.array([0, 1, 2, 1], np.uint8), [0, 1.0, "2", np.int8(1)],
    ],
)  # fmt: skip
def test_a_column_of_any_type_has_the_same_names(column):
    assert class_names(column).tolist() == ["0", "1", "2", "1"]


def test_true_and_one_in_one_column_stay_apart():
    assert class_names(pd.Series([True, 1, 1.0, None], dtype=object)).tolist() == ["True", "1", "1", None]


def test_names_that_differ_by_case_space_or_notation_are_found():
    names = ["B cell", "b cell", "B cell ", "NK", "1", "1.0", "01", "2"]
    assert near_duplicates(names) == [("B cell", "b cell", "B cell "), ("1", "1.0", "01")]
