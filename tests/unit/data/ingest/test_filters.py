"""Conditions on cells become one value filter that SOMA understands, whatever stands in the values."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pipeline.config.job import CellsConfig
from pipeline.data.ingest.filters import find_values, value_filter
from pipeline.data.soma.write import write_experiment
from scldm.errors import InputError

AWKWARD = ["10x 3' v3", 'say "hi"', "back\\slash", "both ' and \"", "naïve β", "plain"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    n = 60
    obs = pd.DataFrame(
        {
            "assay": pd.Categorical([AWKWARD[i % len(AWKWARD)] for i in range(n)]),
            "class": [f"c{i % 3}" for i in range(n)],
            "two words": np.arange(n) % 4,
            "score": np.arange(n) / 2,
            "batch": pd.Categorical([str(1 + i % 3) for i in range(n)]),
            "doublet": pd.Categorical([str(i % 2 == 0) for i in range(n)]),
            "dose": pd.Categorical([("0.1", "1.0", "10.0")[i % 3] for i in range(n)]),
            "is_primary_data": np.arange(n) % 5 == 0,
            "tissue_general": pd.Categorical(["lung", "blood", "gut"] * 20),
        }
    )
    var = pd.DataFrame({"feature_id": ["A"], "feature_name": ["a"], "feature_length": [0]})
    return write_experiment(
        tmp_path_factory.mktemp("cells") / "soma", obs, var, [sp.csr_matrix(np.ones((n, 1), np.float32))]
    )


def found(store, obs_filter=None, **conditions):
    config = CellsConfig.model_validate(conditions)
    return store.obs([], value_filter(find_values(config, store), obs_filter))["soma_joinid"].tolist()


@pytest.mark.parametrize("value", AWKWARD)
def test_every_value_is_found_whatever_its_quotes(store, value):
    expected = [i for i in range(60) if AWKWARD[i % len(AWKWARD)] == value]
    assert found(store, assay=value) == expected
    assert found(store, assay=[value]) == expected


def test_a_list_lets_any_of_its_values_through(store):
    assert found(store, assay=AWKWARD[:2]) == [i for i in range(60) if i % 6 < 2]
    assert found(store, where={"two words": [1, 3]}) == [i for i in range(60) if i % 2]
    assert found(store, where={"score": [0.5, 1.5]}) == [1, 3]
    assert found(store, where={"is_primary_data": [True, False]}) == list(range(60))


def test_conditions_and_the_filter_hold_together(store):
    expected = [i for i in range(60) if i % 5 == 0 and i % 3 == 0 and (i < 10 or i > 50)]
    assert found(store, "score < 5 or score > 25", is_primary_data=True, tissue="lung") == expected


def test_a_column_may_be_named_like_a_python_word(store):
    assert found(store, where={"class": "c1"}) == [i for i in range(60) if i % 3 == 1]


def test_no_condition_is_no_filter():
    assert value_filter(CellsConfig().conditions()) is None
    assert value_filter({}, "a == 1") == "a == 1"


def test_false_is_a_condition(store):
    assert found(store, is_primary_data=False) == [i for i in range(60) if i % 5]


def test_unknown_values_and_columns_are_all_named(store):
    with pytest.raises(InputError) as error:
        found(store, tissue=["lungs", "blood"], organism="mouse", where={"donor": "x"})
    text = str(error.value)
    assert "ingest.cells.tissue: obs column 'tissue_general' has no value 'lungs' (did you mean 'lung'?" in text
    assert "ingest.cells.organism: obs has no column 'organism'" in text
    assert "ingest.source.organism" in text
    assert "ingest.cells.where.donor: obs has no column 'donor'" in text


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ({"assay": "x", "where": {"assay": "y"}}, "say it once"),
        ({"tissue": []}, "tissue_general lists no value"),
        ({"where": {"donor": []}}, "donor lists no value"),
    ],
)
def test_conditions_that_contradict_or_say_nothing_are_refused(conditions, words):
    with pytest.raises(ValueError, match=words):
        CellsConfig.model_validate(conditions)


def test_a_value_is_found_by_the_name_of_its_class_whatever_its_type(store):
    assert found(store, where={"batch": [1, 2.0]}) == [i for i in range(60) if i % 3 < 2]
    assert found(store, where={"doublet": False}) == list(range(1, 60, 2))
    assert found(store, where={"dose": [1, "10"]}) == [i for i in range(60) if i % 3]
    assert found(store, where={"two words": "3", "is_primary_data": "True"}) == [15, 35, 55]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"batch": 4}, "'batch' has no value 4 (it has: 1, 2, 3)"),
        ({"batch": True}, "'batch' has no value True"),
        ({"doublet": "false"}, "has no value 'false' (did you mean 'False'?"),
        ({"score": "high"}, "where.score: obs column 'score' holds numbers, and 'high' is none"),
        ({"is_primary_data": 1}, "where.is_primary_data: obs column 'is_primary_data' holds true and false, and 1 is"),
    ],
)
def test_a_value_that_a_column_cannot_hold_is_refused(store, where, words):
    with pytest.raises(InputError) as error:
        found(store, where=where)
    assert words in str(error.value)


def test_a_filter_on_a_column_with_a_space_says_how_to_write_it(store):
    with pytest.raises(InputError, match="a column whose name is no plain word is written attr"):
        found(store, "`two words` > 2")
    assert found(store, "attr('two words') > 2") == list(range(3, 60, 4))
