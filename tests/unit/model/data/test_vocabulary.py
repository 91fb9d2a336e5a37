"""Vocabularies keep the type of a label, and generated obs has it."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest

from scldm.data.label_type import LabelType
from scldm.data.vocabulary import LabelVocabulary, Vocabulary

REAL = {
    "whole": pd.Series([3, 1, 2]),
    "small": pd.Series([3, 1, 2], dtype=np.uint8),
    "boolean": pd.Series([True, False, True]),
    "dose": pd.Series([0.1, 1.0, 0.5], dtype=np.float32),
    "text": pd.Series(["b", "a", "None"], dtype="category"),
    "cluster": pd.Series([0, 1, 10], dtype="category"),
    "stage": pd.Series(pd.Categorical(["mid", "late", "early"], ["early", "mid", "late"], ordered=True)),
}


def vocabulary_of(column: pd.Series) -> LabelVocabulary:
    from scldm.data.class_names import class_names

    return LabelVocabulary("label", tuple(sorted(set(class_names(column)))), LabelType.of(column))


@pytest.mark.parametrize("name", REAL)
def test_a_label_comes_back_in_its_type_and_can_be_joined_and_written(name, tmp_path):
    column = REAL[name]
    vocabulary = Vocabulary.from_json(Vocabulary((), (), (vocabulary_of(column),)).to_json())
    ids = vocabulary.label("label").encode(column)
    made = pd.DataFrame({"label": vocabulary.label("label").column(ids, used=ids)}, index=["a", "b", "c"])
    assert made["label"].tolist() == column.tolist()
    real = anndata.AnnData(obs=column.rename("label").to_frame().set_axis(["r1", "r2", "r3"]))
    both = anndata.concat([real, anndata.AnnData(obs=made)])
    both.write_h5ad(tmp_path / "both.h5ad")
    back = anndata.read_h5ad(tmp_path / "both.h5ad").obs["label"]
    assert back.tolist() == 2 * column.tolist()
    assert str(back.dtype) == str(column.dtype)


@pytest.mark.parametrize("name", REAL)
def test_cells_without_the_label_are_missing_and_can_be_joined_and_written(name, tmp_path):
    label = vocabulary_of(REAL[name])
    ids = np.array([0, label.null_id])
    made = pd.DataFrame({"label": label.column(ids, used=ids)}, index=["a", "b"])
    assert made["label"].isna().tolist() == [False, True]
    real = anndata.AnnData(obs=REAL[name].rename("label").to_frame().set_axis(["r1", "r2", "r3"]))
    anndata.concat([real, anndata.AnnData(obs=made)]).write_h5ad(tmp_path / "both.h5ad")


def test_only_used_categories_are_kept_in_the_order_of_the_data():
    label = vocabulary_of(REAL["stage"])
    made = label.column(label.encode(["late", "early"]), used=label.encode(["late", "early"]))
    assert list(made.categories) == ["early", "late"]
    assert made.ordered


def test_a_vocabulary_of_text_is_written_as_before_and_an_old_one_opens():
    text = Vocabulary(("g",), ("G",), (LabelVocabulary("cell_type", ("B", "NK")),))
    old = '{"feature_ids": ["g"], "feature_names": ["G"], "labels": {"cell_type": ["B", "NK"]}}'
    assert text.to_json() == old
    assert Vocabulary.from_json(old) == text


def test_a_class_may_be_given_in_any_type():
    label = LabelVocabulary("day", ("1", "2"))
    assert label.encode([1, 1.0, "2", np.int64(2), None, float("nan"), ""]).tolist() == [0, 0, 1, 1, 2, 2, 2]
