"""Tables and lists are read as Excel, R and pandas write them, or refused with the line and what to change."""

from __future__ import annotations

import pandas as pd
import pytest

from scldm.data.user_table import TableError, read_table

NAMES = pd.DataFrame({"cell_type": ["B cell", "NK"], "n_cells": ["3", "2"]})


def read(tmp_path, content: str | bytes, name: str = "t.csv", **options) -> pd.DataFrame:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(path, "generate.conditions", **options)


def refused(tmp_path, content: str | bytes, name: str = "t.csv") -> str:
    with pytest.raises(TableError) as error:
        read(tmp_path, content, name)
    assert "generate.conditions: " in str(error.value)
    assert name in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffcell_type;n_cells\r\nB cell;3\r\nNK;2\r\n",
        "cell_type\tn_cells\nB cell\t3\nNK\t2\n",
        " cell_type , n_cells \n B cell, 3\nNK ,2\n",
        'cell_type, n_cells\n"B cell", "3"\n"NK", 2',
        ",cell_type,n_cells\n0,B cell,3\n1,NK,2\n",
        '"","cell_type","n_cells"\n"1","B cell",3\n"2","NK",2\n',
        "Unnamed: 0,cell_type,n_cells\n0,B cell,3\n1,NK,2\n",
        "\n,,\ncell_type,n_cells\n,,\nB cell,3\n\n,\nNK,2,,,\n",
        "cell_type,n_cells,,\nB cell,3,,\nNK,2,,\n",
    ],
    ids=["excel", "tabs", "spaces", "quotes", "pandas", "r", "read-again", "empty-rows", "empty-columns"],
)
def test_what_spreadsheets_and_libraries_write_is_the_same_table(tmp_path, content):
    pd.testing.assert_frame_equal(read(tmp_path, content), NAMES)
    assert list(read(tmp_path, content, "t.tsv")) == ["cell_type", "n_cells"]


def test_a_name_may_hold_a_separator_in_quotes(tmp_path):
    table = read(tmp_path, '"CD4+, naive; or not",n_cells\n"a, b",1\n')
    assert table.to_dict("list") == {"CD4+, naive; or not": ["a, b"], "n_cells": ["1"]}
    assert list(read(tmp_path, "type, fine\tn_cells\na\t1\n", "t.tsv")) == ["type, fine", "n_cells"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("cell_type;n_cells,x\nB;1,2\n", ["a comma and a semicolon", "in double quotes"]),
        ("cell_type,n_cells\nB,1\nNK\n", ["line 3 has 1 fields and the header 2 (NK)"]),
        ("cell_type,n_cells\n\nCD4, naive,1\n", ["line 3 has 3 fields and the header 2 (CD4, naive, 1)", "quotes"]),
        ("cell_type,n_cells\nB,1\n\"NK,2\n", ["line 3", "double quote"]),
        (",cell_type,n_cells\nx,B,1\n", ["the first column has no name (first value: 'x')", "to_csv(index=False)"]),
        ("cell_type,,n_cells\nB,x,1\n", ["column 2 has no name"]),
        ("cell_type,cell_type \nB,x\n", ["cell_type is there more than once"]),
        ("cell_type,n_cells\nB,1\nZürich,2\n".encode("latin-1"), ["not UTF-8", "line 3", "Zürich", "'CSV UTF-8'"]),
        ("cell_type,n_cells\nB,1\n".encode("utf-16"), ["its encoding is UTF-16", "'CSV UTF-8'"]),
        ("cell_type,n_cells\nB,1\n".encode("utf-16-le"), ["its encoding is UTF-16"]),
        ("\n,,\n", ["it is empty"]),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_refused_with_its_place_and_a_remedy(tmp_path, content, words):
    said = refused(tmp_path, content)
    assert [w for w in words if w not in said] == []


def test_a_first_column_without_a_name_can_be_given_one(tmp_path):
    text = ",cell_type\nAAAC-1,B\nAAAG-1,NK\n"
    assert read(tmp_path, text, first="barcode")["barcode"].tolist() == ["AAAC-1", "AAAG-1"]
    both = ",cell_type,barcode\ncell one,B,AAAC-1\ncell two,NK,AAAG-1\n"
    assert list(read(tmp_path, both, first="barcode")) == ["cell_type", "barcode"]
    pd.DataFrame({"cell_type": ["B"]}, index=["AAAC-1"]).to_parquet(tmp_path / "t.parquet")
    assert list(read_table(tmp_path / "t.parquet", "setting", first="barcode")) == ["barcode", "cell_type"]


def test_fields_that_only_space_told_apart_are_listed(tmp_path):
    table = read(tmp_path, "cell_type,n_cells\nB,1\nB ,2\nNK,1\n")
    assert table["cell_type"].tolist() == ["B", "B", "NK"]
    assert table.attrs["joined"] == ["B"]
