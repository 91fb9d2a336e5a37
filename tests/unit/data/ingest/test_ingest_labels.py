"""What becomes of labels in ingest: one name whatever the type, types that are kept, missing values that are said."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers.files.h5ad_cases import N, look, save, told
from pydantic import ValidationError

from pipeline.config.apply import PerturbConfig
from pipeline.config.context import StageContext
from pipeline.config.job import IngestConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.inspection.examine import Question, examine
from pipeline.stages import ingest
from scldm.data.label_type import LabelType
from scldm.errors import InputError

EVERY_OTHER = ["a", "b"] * (N // 2)


def run(folder, **config):
    folder.mkdir()
    context = StageContext(folder, {}, 0, SimpleNamespace(), None)
    facts = ingest.run(IngestConfig.model_validate(config), context)
    return facts, IngestedDataset.open(Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0))


def ingested(folder, path, *labels, **config):
    return run(folder, source={"type": "h5ad", "path": str(path)}, labels=list(labels), **config)


def test_text_in_one_file_and_floats_in_another_are_the_same_classes(tmp_path):
    (tmp_path / "two").mkdir()
    numbers = [i % 4 for i in range(N)]
    save(tmp_path / "two" / "a.h5ad", cluster=[str(i) for i in numbers])
    save(tmp_path / "two" / "b.h5ad", names=[f"d{i}" for i in range(N)], cluster=[float(i) for i in numbers])
    facts, data = ingested(tmp_path / "stage", tmp_path / "two", "cluster")
    assert data.vocabulary.label("cluster").classes == ("0", "1", "2", "3")
    assert set(facts["label_counts"]["cluster"]) == {"0", "1", "2", "3"}
    reports = examine(Question(str(tmp_path / "two"), labels=("cluster",)))
    assert [set(r.facts["classes"]["cluster"]) for r in reports[:2]] == 2 * [{"0", "1", "2", "3"}]


@pytest.mark.parametrize(
    ("column", "classes", "kind"),
    [
        ([i % 2 == 0 for i in range(N)], ("False", "True"), LabelType("boolean", False)),
        ([i % 3 for i in range(N)], ("0", "1", "2"), LabelType("int64", False)),
        (pd.Categorical([i % 2 for i in range(N)]), ("0", "1"), LabelType("int64")),
        (np.array([0.5, 1] * (N // 2), np.float32), ("0.5", "1"), LabelType("float32", False)),
        (["001", "1"] * (N // 2), ("001", "1"), LabelType()),
        (pd.Categorical(EVERY_OTHER, ["b", "a"], ordered=True), ("a", "b"), LabelType(order=("b", "a"))),
    ],
)
def test_the_type_of_a_label_is_recorded(tmp_path, column, classes, kind):
    path = save(tmp_path / "a.h5ad", label=column)
    _, data = ingested(tmp_path / "stage", path, "label")
    assert data.vocabulary.label("label").classes == classes
    assert data.vocabulary.label("label").type == kind


def test_a_store_keeps_the_order_of_categories(tmp_path):
    path = save(tmp_path / "a.h5ad", label=pd.Categorical(EVERY_OTHER, ["b", "a"], ordered=True))
    ingested(tmp_path / "first", path, "label")
    soma = {"type": "soma", "uri": str(tmp_path / "first" / "soma")}
    _, data = run(tmp_path / "second", source=soma, labels=["label"])
    assert data.vocabulary.label("label").type.order == ("b", "a")


def test_a_class_called_none_is_kept_and_pointed_out(tmp_path):
    path = save(tmp_path / "a.h5ad", guide=["None", "TP53"] * (N // 2))
    facts, data = ingested(tmp_path / "stage", path, "guide")
    assert data.vocabulary.label("guide").classes == ("None", "TP53")
    assert any("named like a missing value (first: 'None' (20 cells))" in note for note in facts["notes"])
    assert "named like a missing value (first: 'None' (20 cells))" in told(look(path, "guide"))
    with pytest.raises(
        InputError, match=r"20 of 40 cells have no guide .* missing are 20 'None'; ingest.missing_text: .. "
    ):
        ingested(tmp_path / "none", path, "guide", missing_text=["None"])


def test_missing_labels_are_said_with_their_spelling_and_can_be_kept(tmp_path):
    path = save(tmp_path / "a.h5ad", guide=["nan", "", "x", "y"] * (N // 4))
    drop = {"missing_label": "drop", "split": {"validation": 0, "test": 0}}
    facts, data = ingested(tmp_path / "stage", path, "guide", **drop)
    assert data.vocabulary.label("guide").classes == ("x", "y")
    assert "20 cells have no guide and are left out (10 'nan', 10 empty)." in facts["notes"]
    _, kept = ingested(tmp_path / "kept", path, "guide", missing_text=[], **drop)
    assert kept.vocabulary.label("guide").classes == ("nan", "x", "y")
    assert look(path, "guide", missing_text=()).facts["classes"]["guide"]["nan"] == 10


def test_classes_that_differ_by_case_or_space_are_warned_of(tmp_path):
    path = save(tmp_path / "a.h5ad", kind=["B cell", "b cell", "B cell ", "NK"] * (N // 4))
    facts, _ = ingested(tmp_path / "stage", path, "kind")
    words = "3 classes of kind differ only by case, white space or the notation of a number"
    assert any(words in note for note in facts["notes"])
    assert words in told(look(path, "kind"))


def test_classes_that_differ_between_files_are_warned_of(tmp_path):
    save(tmp_path / "a.h5ad", kind=["B cell", "NK"] * (N // 2))
    save(tmp_path / "b.h5ad", kind=["b cell", "NK"] * (N // 2))
    together = examine(Question(str(tmp_path), labels=("kind",)))[-1]
    assert "2 classes of kind differ only by case" in told(together)


def test_held_out_classes_are_named_by_number_text_or_boolean(tmp_path):
    path = save(tmp_path / "a.h5ad", day=[float(i % 4) for i in range(N)], treated=[i % 2 == 0 for i in range(N)])
    held_out = {"split": "test", "combinations": [{"day": 2, "treated": True}]}
    facts, _ = ingested(tmp_path / "stage", path, "day", "treated", split={"held_out": held_out})
    assert facts["label_counts"]["day"]["2"]["train"] == 0
    (tmp_path / "held.csv").write_text("day,treated\n2,True\n")
    table = {"split": "test", "table": str(tmp_path / "held.csv")}
    again, _ = ingested(tmp_path / "again", path, "day", "treated", split={"held_out": table})
    assert again["label_counts"] == facts["label_counts"]


def test_a_setting_that_names_a_class_takes_a_number():
    source = {"type": "h5ad", "path": "a.h5ad"}
    assert PerturbConfig.model_validate({"source": source, "to": {"day": 1.0, "treated": True}}).to == {
        "day": "1", "treated": "True",
    }  # fmt: skip
    with pytest.raises(ValidationError):
        PerturbConfig.model_validate({"source": source, "to": {"day": [1]}})


def test_the_default_of_missing_text_does_not_change_the_version_of_a_stage():
    plain = IngestConfig.model_validate({"source": {"type": "synthetic"}})
    assert "missing_text" not in plain.model_dump(mode="json")
    assert "missing_text" in plain.model_copy(update={"missing_text": ()}).model_dump(mode="json")
