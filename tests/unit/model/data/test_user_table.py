"""Tables of users are read whole, as text, and only an empty field is missing."""

from __future__ import annotations

import pandas as pd
import pytest

from scldm.data.user_table import TableError, read_table, whole_table, with_numbers
from scldm.data.vocabulary import LabelVocabulary, Vocabulary

VOCABULARY = Vocabulary((), (), (LabelVocabulary("cell_type", ("B", "NK")),))


def test_fields_stay_text_and_only_an_empty_one_is_missing(tmp_path):
    (tmp_path / "t.csv").write_text("donor,kind\n001,NA\n2,None\n1e5,\nTrue,nan\n")
    table = read_table(tmp_path / "t.csv", "setting")
    assert table["donor"].tolist() == ["001", "2", "1e5", "True"]
    assert table["kind"].isna().tolist() == [False, False, True, False]
    assert table["kind"].dropna().tolist() == ["NA", "None", "nan"]


@pytest.mark.parametrize("make", [lambda t: t.value_counts(), lambda t: t.groupby(["cell_type", "day"]).size()])
def test_labels_in_the_index_are_columns(make):
    counts = make(pd.DataFrame({"cell_type": ["B", "B", "NK"], "day": [1, 1, 2]}))
    table = whole_table(counts, "conditions")
    assert list(table) == ["cell_type", "day", "n_cells"]
    assert table.loc[table["cell_type"] == "B", "n_cells"].tolist() == [2]


def test_a_parquet_file_keeps_its_index(tmp_path):
    pd.Series(["B", "B"], name="cell_type").value_counts().to_frame("n_cells").to_parquet(tmp_path / "t.parquet")
    assert list(read_table(tmp_path / "t.parquet", "setting")) == ["cell_type", "n_cells"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pd.DataFrame({"n_cells": [1, 2]}, index=["B", "NK"]), "without a name .first: 'B'"),
        (pd.DataFrame({"cell_type": ["B"], "n_cells": [1]}, index=["NK"]), "without a name .first: 'NK'"),
        (pd.DataFrame({"cell_type": ["B"]}, index=pd.Index(["B"], name="cell_type")), "cell_type is there more"),
    ],
)  # fmt: skip
def test_a_part_without_a_place_is_refused(table, words):
    with pytest.raises(TableError, match=words):
        whole_table(table, "conditions", VOCABULARY)


def test_names_of_cells_and_numbers_of_rows_are_left_aside():
    table = pd.DataFrame({"cell_type": ["B", "NK"]}, index=["AAAC-1", "AAAG-1"])
    assert list(whole_table(table, "conditions", VOCABULARY)) == ["cell_type"]
    assert list(whole_table(table.set_axis([7, 3]), "conditions")) == ["cell_type"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("a,b\n1,2,3\n", "more fields than the header"), ("", "cannot be read"), ('a,b\n"1,2\n', "cannot be read")],
)
def test_a_file_that_is_not_a_whole_table_is_refused(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(TableError, match=words):
        read_table(tmp_path / "t.csv", "setting")
    with pytest.raises(TableError, match=r"the ending is '\.xlsx'; known: \.csv"):
        read_table((tmp_path / "t.csv").rename(tmp_path / "t.xlsx"), "setting")


def test_a_column_becomes_numbers_only_if_every_text_is_a_plain_number():
    text = {"age": ["31", None, "4.5"], "donor": ["001", "2", "3"], "plate": ["1e5", "2", "3"]}
    table = with_numbers(pd.DataFrame({**text, "treated": ["True", "False", "True"]}, dtype=object))
    assert [table[c].dtype.kind for c in table] == ["f", "O", "O", "b"]
