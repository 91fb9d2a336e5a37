"""Labels whose classes are values: how ingest reads them, what it refuses, and what it writes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers.files.h5ad_cases import N, save
from pydantic import ValidationError

from pipeline.config.context import StageContext
from pipeline.config.input_paths import input_contents, settings_without_paths
from pipeline.config.job import IngestConfig
from pipeline.core.manifest import Manifest
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.stages import ingest
from scldm.data.labels.values import Number, Sets, Vectors
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError

ALL_TRAIN = {"validation": 0, "test": 0}
DOSES = ["0", "0.1", "1", "10"] * (N // 4)


def config(path, label, values, **more) -> IngestConfig:
    given = {"source": {"type": "h5ad", "path": str(path)}, "labels": [label], "label_values": {label: values}}
    return IngestConfig.model_validate({**given, "split": ALL_TRAIN, **more})


def ingested(folder, path, label, values, **more):
    folder.mkdir()
    facts = ingest.run(config(path, label, values, **more), StageContext(folder, {}, 0, SimpleNamespace(), None))
    return facts, IngestedDataset.open(Manifest("ingest", "v", str(folder), {}, {}, facts, 0.0, 0.0))


def genes_table(path, names=("A", "B", "C", "D"), **columns) -> str:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"name": names, **{f"v{i}": rng.normal(size=len(names)) for i in range(3)}, **columns})
    table.to_csv(path, index=False)
    return str(path)


def test_numbers_are_kept_by_value_and_sorted_so(tmp_path):
    path = save(tmp_path / "a.h5ad", dose=["1e1", "2", "10.0", "0.1"] * (N // 4))
    facts, data = ingested(tmp_path / "stage", path, "dose", {"type": "number", "unit": "uM"})
    label = data.vocabulary.label("dose")
    assert label.classes == ("0.1", "2", "10")
    assert isinstance(label.values, Number)
    assert label.values.mean == pytest.approx(np.mean([0.1, 2, 10]))
    assert facts["label_values"]["dose"]["summary"] == "a number in uM, linear scale, 0.1 to 10 (3 values)"
    assert (data.cells["label:dose"].to_numpy() == [2, 1, 2, 0] * (N // 4)).all()


def test_a_column_of_measurements_may_be_a_number(tmp_path):
    path = save(tmp_path / "a.h5ad", age=np.linspace(0.5, 80.25, N))
    _, data = ingested(tmp_path / "stage", path, "age", {"type": "number", "unit": "years"})
    assert len(data.vocabulary.label("age").classes) == N
    folder = tmp_path / "classes"
    folder.mkdir()
    plain = IngestConfig.model_validate({"source": {"type": "h5ad", "path": str(path)}, "labels": ["age"]})
    with pytest.raises(InputError, match=r"make it a number with ingest\.label_values\.age\.type=number"):
        ingest.run(plain, StageContext(folder, {}, 0, SimpleNamespace(), None))


def test_sets_are_without_order_and_a_control_adds_nothing(tmp_path):
    path = save(tmp_path / "a.h5ad", drugs=["B+A", "A+B", "ctrl+A", "ctrl"] * (N // 4))
    _, data = ingested(tmp_path / "stage", path, "drugs", {"type": "set", "zero": ["ctrl"]})
    label = data.vocabulary.label("drugs")
    assert label.classes == ("A", "A+B", "ctrl")
    assert isinstance(label.values, Sets)
    assert label.values.members == ("A", "B")
    assert label.values.features(label.classes).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_vectors_of_all_names_are_kept_and_read_again(tmp_path):
    path = save(tmp_path / "a.h5ad", gene=["A", "B", "C", "ctrl"] * (N // 4))
    table = genes_table(tmp_path / "genes.csv")
    facts, data = ingested(tmp_path / "stage", path, "gene", {"type": "vector", "embeddings": table, "zero": ["ctrl"]})
    label = data.vocabulary.label("gene")
    assert isinstance(label.values, Vectors)
    assert label.values.table.names == ("A", "B", "C", "D")
    features = label.values.features(["A", "B", "C", "D", "ctrl"])
    assert features.shape == (5, facts["label_values"]["gene"]["n_features"])
    assert features[4].tolist() == [0] * (features.shape[1] - 1) + [1]
    measured = features[:3, :-1]
    np.testing.assert_allclose(measured.mean(0), 0, atol=1e-6)
    assert (measured**2).mean() == pytest.approx(1)
    assert Vocabulary.load(tmp_path / "stage" / "vocabulary.json").digest == data.vocabulary.digest


def test_the_cosine_of_the_nearest_name_is_that_of_whole_standardised_vectors(tmp_path):
    path = save(tmp_path / "a.h5ad", gene=["A", "B", "C", "A"] * (N // 4))
    table = genes_table(tmp_path / "genes.csv")
    _, data = ingested(tmp_path / "stage", path, "gene", {"type": "vector", "embeddings": table})
    x = pd.read_csv(table, index_col=0)
    x = (x - x[:3].mean()) / x[:3].std(ddof=0)
    cosines = x[:3] @ x.loc["D"] / np.linalg.norm(x[:3], axis=1) / np.linalg.norm(x.loc["D"])
    note = data.vocabulary.label("gene").values.note("gene", "D")
    assert f"{cosines.idxmax()}, cosine {cosines.max():.2f}." in note


def test_scale_and_features_are_those_of_training_cells_only(tmp_path):
    path = save(tmp_path / "a.h5ad", dose=DOSES)
    held_out = {"held_out": {"combinations": [{"dose": "1e1"}]}}
    facts, data = ingested(tmp_path / "stage", path, "dose", {"type": "number"}, split=held_out)
    values = data.vocabulary.label("dose").values
    assert values.trained == ("0", "0.1", "1")
    assert values.mean == pytest.approx(1.1 / 3)
    assert "dose 10 is above the largest of the training cells, 1: extrapolated." in facts["notes"]


def test_a_held_out_set_is_found_in_any_order(tmp_path):
    path = save(tmp_path / "a.h5ad", drugs=["A", "B", "A+B", "C"] * (N // 4))
    held_out = {"held_out": {"combinations": [{"drugs": "B+A"}]}}
    facts, data = ingested(tmp_path / "stage", path, "drugs", {"type": "set"}, split=held_out)
    assert facts["n_cells"]["test"] == N // 4
    assert "A+B" not in data.vocabulary.label("drugs").values.trained


# ---- what is refused ---------------------------------------------------------------------------------------------
REFUSED = [
    (["0.1", "1", "high", "10 uM"] * (N // 4), {"type": "number"}, "dose is a number, and 2 of its values are none: "),
    (DOSES, {"type": "number", "scale": "log"}, r"1 values of dose have no logarithm: '0' \(10 cells\); .*=linear"),
    (["-1", "0", "1", "2"] * (N // 4), {"type": "number", "scale": "log"}, "2 values of dose have no logarithm"),
    (["0,5", "1", "2", "3"] * (N // 4), {"type": "number"}, r"'0,5' is no number \(write 0.5\)"),
    (["1", "1", "1.0", "1"] * (N // 4), {"type": "number"}, r"the training cells have one value of it \(1\)"),
    (["A++B", "A", "B", "+"] * (N // 4), {"type": "set"}, "2 classes of dose are no sets: "),
]  # fmt: skip


@pytest.mark.parametrize(("column", "values", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_values_that_are_none_are_refused_with_their_cells(tmp_path, column, values, message):
    path = save(tmp_path / "a.h5ad", dose=column)
    with pytest.raises(InputError, match=message):
        ingested(tmp_path / "stage", path, "dose", values)


def test_a_dose_of_zero_on_a_log_scale_is_the_control_if_it_is_named_so(tmp_path):
    path = save(tmp_path / "a.h5ad", dose=DOSES)
    _, data = ingested(tmp_path / "stage", path, "dose", {"type": "number", "scale": "log", "zero": [0]})
    values = data.vocabulary.label("dose").values
    assert values.mean == pytest.approx(0)  # of log10 of 0.1, 1, 10
    assert values.features(["0", "1"])[:, -1].tolist() == [1, 0]
    assert not values.features(["0"])[0, :-1].any()


def test_names_without_a_vector_are_all_named(tmp_path):
    path = save(tmp_path / "a.h5ad", gene=["A", "X", "Y", "B"] * (N // 4))
    table = genes_table(tmp_path / "genes.csv")
    with pytest.raises(InputError, match=r"no vector of 2 classes of gene: 'X' \(10 cells\), 'Y' \(10 cells\); add"):
        ingested(tmp_path / "stage", path, "gene", {"type": "vector", "embeddings": table})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            pd.DataFrame({"name": ["A", "B"], "v0": [1, np.nan]}),
            "1 fields are no finite numbers, the first is column v0",
        ),
        (pd.DataFrame({"name": ["A", "B"], "v0": ["1", "x"]}), "the first is column v0 of B"),
        (pd.DataFrame({"name": ["A", "A"], "v0": [1, 2]}), r"1 names have several rows \(A\)"),
        (pd.DataFrame({"name": ["A", None], "v0": [1, 2]}), "1 rows have no name, the first is row 2"),
        (pd.DataFrame({"v0": [1.5, 2.5], "v1": [1, 2]}), "has no names: name their column name"),
        (pd.DataFrame({"name": ["A", "B"], "v": [[1.0, 2.0], [1.0]]}), "1 vectors have another width than"),
    ],
)
def test_a_table_of_vectors_that_cannot_be_used_is_refused(tmp_path, table, message):
    path = save(tmp_path / "a.h5ad", gene=["A", "B"] * (N // 2))
    table.to_parquet(tmp_path / "genes.parquet", index=False)
    with pytest.raises(InputError, match=message):
        ingested(tmp_path / "stage", path, "gene", {"type": "vector", "embeddings": str(tmp_path / "genes.parquet")})


def test_one_column_of_lists_is_a_vector(tmp_path):
    path = save(tmp_path / "a.h5ad", gene=["A", "B"] * (N // 2))
    pd.DataFrame({"gene": ["A", "B", "C"], "esm": [[1.0, 2.0], [0.0, 2.5], [3.0, 1.0]]}).to_parquet(
        tmp_path / "genes.parquet"
    )
    values = {"type": "vector", "embeddings": str(tmp_path / "genes.parquet")}
    _, data = ingested(tmp_path / "stage", path, "gene", values)
    assert data.vocabulary.label("gene").values.table.names == ("A", "B", "C")


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match="time: no label of this job"):
        IngestConfig.model_validate({"source": {"type": "synthetic"}, "label_values": {"time": {"type": "number"}}})
    with pytest.raises(ValidationError, match="holds the separator"):
        config("x", "drugs", {"type": "set", "zero": ["a+b"]})


# ---- versions ----------------------------------------------------------------------------------------------------
def test_a_job_without_values_keeps_its_version():
    plain = IngestConfig.model_validate({"source": {"type": "synthetic"}})
    assert "label_values" not in plain.model_dump(mode="json")


def test_the_content_of_a_table_decides_the_version_and_its_path_does_not(tmp_path):
    def settings(name, values=(1.0, 2.0)):
        pd.DataFrame({"name": ["A", "B"], "v0": values}).to_csv(tmp_path / name, index=False)
        vectors = {"type": "vector", "embeddings": str(tmp_path / name)}
        given = {"source": {"type": "synthetic"}, "labels": ["a.gene"], "label_values": {"a.gene": vectors}}
        found = IngestConfig.model_validate(given)
        return json.dumps(settings_without_paths(found, input_contents(found)))

    assert settings("a.csv") == settings("b.csv")
    assert settings("a.csv") != settings("a.csv", (1.0, 3.0))
