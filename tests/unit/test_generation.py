"""What generation is asked for: tables, shards, and everything that can be wrong with them."""

from __future__ import annotations

import pandas as pd
import pytest

from pipeline.generation import Request, RequestRow, check_choice, n_shards, read_request
from pipeline.job import GenerateConfig
from pipeline.stage import InputError
from scldm.vocabulary import LabelVocabulary, Vocabulary

VOCABULARY = Vocabulary(
    ("g1", "g2"), ("A", "B"), (LabelVocabulary("cell_type", ("B", "NK")), LabelVocabulary("donor_id", ("d1", "d2")))
)


def request(**config) -> Request:
    return read_request(GenerateConfig.model_validate(config), VOCABULARY, {})


def test_a_csv_table_may_leave_labels_open(tmp_path):
    path = tmp_path / "conditions.csv"
    path.write_text("cell_type,donor_id,n_cells\nB,d1,3\nNK,,2\n,,1\n")
    rows = request(conditions=str(path)).rows
    assert [(dict(r.condition), r.n_cells) for r in rows] == [
        ({"cell_type": "B", "donor_id": "d1"}, 3),
        ({"cell_type": "NK", "donor_id": None}, 2),
        ({"cell_type": None, "donor_id": None}, 1),
    ]


def test_a_number_per_class_makes_a_row_for_every_class():
    assert [(r.condition["cell_type"], r.n_cells) for r in request(per_label={"cell_type": 7}).rows] == [
        ("B", 7),
        ("NK", 7),
    ]


def test_a_composition_is_scaled_to_the_cells_asked_for():
    composition = pd.DataFrame({"cell_type": ["B", "NK"], "donor_id": ["d1", "d1"], "n_cells": [200, 100]})
    config = GenerateConfig(like="train", n_cells=100)
    scaled = read_request(config, VOCABULARY, {"train": composition})
    assert [r.n_cells for r in scaled.rows] == [67, 33]


def test_all_that_is_wrong_with_a_table_is_said_at_once():
    with pytest.raises(InputError) as error:
        request(cells=[{"cell_type": "NKK", "tissue": "lung", "n_cells": -1}, {"cell_type": "B", "n_cells": 1.5}])
    message = str(error.value)
    assert "no class 'NKK' (did you mean 'NK'?)" in message
    assert "knows no label 'tissue'" in message
    assert "n_cells must be whole numbers >= 0; 2 are not, the first in row 1" in message


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "does not say which cells"),
        ({"per_label": {"cell_type": 1}, "like": "train"}, "takes one of"),
        ({"per_label": {"cell_type": 1}, "n_cells": 5}, "goes with `like`"),
        ({"conditions": "no/such/file.csv"}, "no file no/such/file.csv"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_without_knowing_the_data(config, said):
    assert said in check_choice(GenerateConfig.model_validate(config))[0]


def test_shards_cut_the_request_across_its_rows():
    r = Request((RequestRow({"cell_type": "B"}, 5), RequestRow({"cell_type": "NK"}, 4)))
    assert r.slice(3, 7) == [({"cell_type": "B"}, 2), ({"cell_type": "NK"}, 2)]
    assert r.slice(0, 9) == [({"cell_type": "B"}, 5), ({"cell_type": "NK"}, 4)]
    assert n_shards(r, 4) == 3


def test_a_request_for_no_cells_is_one_empty_shard():
    nothing = request(cells=[{"cell_type": "B", "n_cells": 0}])
    assert nothing.n_cells == 0
    assert n_shards(nothing, 100) == 1
    assert nothing.slice(0, 0) == []
