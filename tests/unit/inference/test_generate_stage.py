"""The generate stage: the AnnData contract, what the table asks for, what is refused; batches change nothing."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.stages.generation_case import generate, hashes, write_inputs
from safetensors.torch import load_file, save_file

from pipeline.core.faults import FaultError
from pipeline.core.shards import ShardStore
from pipeline.inference.generator import Generator
from scldm.cells.cells import concat_obs, read_index
from scldm.data.label_type import LabelType
from scldm.data.vocabulary import LabelVocabulary
from scldm.errors import InputError

TABLE = [
    {"cell_type": "T", "donor": "d1", "n_cells": 50},
    {"cell_type": "NK", "n_cells": 30, "guidance": 2.5, "library_size": 77},
    {"n_cells": 15},
    {"cell_type": "B", "donor": "d_2", "n_cells": 5, "guidance.cell_type": 3.0},
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("models"), strategy="mutually_exclusive")


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    facts = generate(folder, inputs, cells=TABLE, shard_size=40)
    return folder, facts


def read(folder, facts) -> anndata.AnnData:
    return anndata.concat(
        [anndata.read_h5ad(folder / s["file"]) for s in facts["shards"]], merge="same", uns_merge="same"
    )


@pytest.mark.row("G7")
def test_shards_hold_the_cells_that_the_table_asks_for(made):
    folder, facts = made
    cells = read(folder, facts)
    assert [s["n_cells"] for s in facts["shards"]] == [40, 40, 20]
    assert facts["n_cells"] == cells.n_obs == 100
    counts = cells.obs.groupby(["cell_type", "donor"], observed=False, dropna=False).size()
    assert counts[("T", "d1")] == 50
    assert cells.obs["cell_type"].isna().sum() == 15
    assert cells.obs["donor"].isna().sum() == 45
    assert cells.obs_names.is_unique
    assert sorted(cells.obs["gen_index"]) == list(range(100))


def test_cells_keep_the_anndata_contract(made):
    folder, facts = made
    cells = read(folder, facts)
    assert cells.X.format == "csr"
    assert cells.X.dtype == np.int32
    assert cells.X.min() >= 0
    assert cells.X.sum() > 0
    np.testing.assert_array_equal(np.asarray(cells.X.sum(1)).ravel(), cells.obs["total_counts"])
    np.testing.assert_array_equal(np.diff(cells.X.indptr), cells.obs["n_genes"])
    assert cells.obsm["X_scldm"].shape == (100, 12)
    assert cells.obs["is_synthetic"].all()
    assert list(cells.obs["cell_type"].cat.categories) == ["T", "B", "NK"]
    assert list(cells.var_names) == [f"g{i}" for i in range(6)]
    about = cells.uns["scldm"]
    assert about["seed"] == 0
    assert json.loads(about["sampler"])["temperature"] == 1.0
    assert {"vae", "flow", "request", "library_size", "schema_version"} <= set(about)


def test_settings_of_a_row_are_obeyed_and_recorded(made):
    folder, facts = made
    obs = read(folder, facts).obs
    assert (obs.loc[obs["cell_type"] == "NK", "library_size"] == 77).all()
    assert obs.loc[obs["cell_type"] == "T", "library_size"].nunique() > 10
    assert obs.loc[obs["cell_type"] == "NK", "guidance_scale"].unique().tolist() == [2.5]
    assert obs.loc[obs["cell_type"] == "T", "guidance_scale"].unique().tolist() == [1.0]
    b = obs[obs["cell_type"] == "B"]
    assert b["guidance_scale"].isna().all()
    assert b["guidance_scale.cell_type"].unique().tolist() == [3.0]
    assert b["guidance_scale.donor"].unique().tolist() == [1.0]


def test_combinations_that_were_never_seen_are_made_and_named(made, inputs, tmp_path):
    assert [n for n in made[1]["notes"] if n.startswith("No training cell has cell_type B, donor d_2:")]
    facts = generate(tmp_path / "a", inputs, cells=[{"cell_type": "B", "donor": "d1", "n_cells": 1}])
    assert not [n for n in facts["notes"] if "No training cell" in n]
    facts = generate(tmp_path / "b", inputs, cells=[{"cell_type": "NK", "donor": "d1", "n_cells": 1}])
    assert any("No training cell has cell_type NK, donor d1" in n for n in facts["notes"])


@pytest.mark.row("G3")
@pytest.mark.parametrize("batch_size", [1, 7, 64, 256])
def test_a_batch_size_changes_no_byte(made, inputs, tmp_path, batch_size):
    generate(tmp_path / "again", inputs, cells=TABLE, shard_size=40, batch_size=batch_size)
    assert hashes(tmp_path / "again") == hashes(made[0])


@pytest.mark.row("G3")
def test_shards_of_another_size_hold_the_same_cells(made, inputs, tmp_path):
    facts = generate(tmp_path / "other", inputs, cells=TABLE, shard_size=17)
    one, other = read(*made), read(tmp_path / "other", facts)
    assert (one.X != other.X).nnz == 0
    np.testing.assert_array_equal(one.obsm["X_scldm"], other.obsm["X_scldm"])
    pd.testing.assert_frame_equal(one.obs.drop(columns="gen_shard"), other.obs.drop(columns="gen_shard"))


def test_written_genes_are_a_choice_of_columns(made, inputs, tmp_path):
    facts = generate(tmp_path / "some", inputs, cells=TABLE, shard_size=40, genes=["G4", "g1"])
    some, whole = read(tmp_path / "some", facts), read(*made)
    assert list(some.var_names) == ["g1", "g4"]
    assert (some.X != whole[:, ["g1", "g4"]].X).nnz == 0


@pytest.mark.row("G7")
def test_no_cells_are_one_empty_file(inputs, tmp_path):
    facts = generate(tmp_path / "none", inputs, cells=[{"cell_type": "T", "n_cells": 0}])
    cells = read(tmp_path / "none", facts)
    assert cells.shape == (0, 6)
    assert cells.obsm["X_scldm"].shape == (0, 12)
    assert list(cells.obs["cell_type"].cat.categories) == []


@pytest.mark.row("G7")
def test_one_unconditional_cell(inputs, tmp_path):
    facts = generate(tmp_path / "one", inputs, n_cells=1)
    assert read(tmp_path / "one", facts).obs["cell_type"].isna().all()


def test_guidance_per_label_of_a_joint_model_is_refused(tmp_path):
    inputs = write_inputs(tmp_path / "models", strategy="joint")
    with pytest.raises(InputError, match=r"trained with joint labels.*give one scale"):
        generate(tmp_path / "a", inputs, cells=[{"cell_type": "T", "donor": "d1", "n_cells": 1, "guidance.donor": 2}])
    facts = generate(tmp_path / "b", inputs, cells=[{"cell_type": "T", "n_cells": 1, "guidance": 2}])
    assert read(tmp_path / "b", facts).obs["guidance_scale"].tolist() == [2.0]


def test_settings_of_the_job_are_used_where_the_table_says_nothing(inputs, tmp_path):
    facts = generate(tmp_path / "a", inputs, n_cells=4, library_size=33, sampler={"weights": "raw", "guidance": 3.0})
    obs = read(tmp_path / "a", facts).obs
    assert obs["library_size"].tolist() == [33.0] * 4
    assert obs["guidance_scale"].tolist() == [3.0] * 4
    other = generate(tmp_path / "b", inputs, n_cells=4, library_size=33, sampler={"weights": "ema", "guidance": 3.0})
    raw, ema = (read(tmp_path / x, f).obsm["X_scldm"] for x, f in (("a", facts), ("b", other)))
    assert abs(raw - ema).max() > 1e-3


@pytest.mark.row("G5")
def test_a_write_that_fails_is_tried_again(inputs, tmp_path, monkeypatch):
    commit, tries = ShardStore.commit, []

    def once_broken(self, name, write):
        tries.append(name)
        if len(tries) == 1:
            raise OSError("stale file handle")
        return commit(self, name, write)

    monkeypatch.setattr(ShardStore, "commit", once_broken)
    monkeypatch.setattr("pipeline.inference.generator.WAIT_SECONDS", 0.0)
    generate(tmp_path / "a", inputs, n_cells=3)
    assert tries == ["part-00000.h5ad"] * 2


def test_a_shard_that_kills_its_actor_each_time_ends_the_job(inputs, tmp_path, monkeypatch):
    def die(self, name, write):
        raise FaultError("dies")

    monkeypatch.setattr(ShardStore, "commit", die)

    def stubborn(todo, spec, context):
        while True:
            try:
                yield Generator(spec).make(todo[0])
            except FaultError:
                continue

    with pytest.raises(RuntimeError, match="shard 0 was started 5 times and its actor died each time"):
        generate(tmp_path / "a", inputs, pool=stubborn, n_cells=3)


@pytest.mark.row("N5")
@pytest.mark.parametrize("which", ["train_vae", "train_flow"])
def test_N5_a_model_that_gives_no_numbers_ends_the_job_with_shard_and_cells_and_leaves_no_file(tmp_path, which):
    inputs = write_inputs(tmp_path / "models")
    path = tmp_path / "models" / which / "model" / "model.safetensors"
    weights = {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in load_file(path).items()}
    save_file(weights, path)
    with pytest.raises(FloatingPointError, match=r"shard 0: .* cells \[0, 1, 2"):
        generate(tmp_path / "a", inputs, n_cells=5, sampler={"solver": "euler", "steps": 2})
    assert not list((tmp_path / "a" / "cells").glob("part-*"))
    assert not list((tmp_path / "a" / "cells").glob(".part-*"))


def test_the_rate_is_measured(made):
    assert made[1]["cells_per_s"] > 0


def test_labels_have_the_type_of_the_data_in_shards_index_and_exports(tmp_path):
    labels = (
        LabelVocabulary("treated", ("False", "True"), LabelType("boolean", categorical=False)),
        LabelVocabulary("day", ("1", "2", "7"), LabelType("int64", categorical=False)),
        LabelVocabulary("stage", ("early", "late", "mid"), LabelType(order=("early", "mid", "late"))),
    )
    inputs = write_inputs(tmp_path / "models", labels=labels)
    rows = [
        {"treated": True, "day": 7.0, "stage": "late", "n_cells": 3},
        {"treated": False, "day": "1", "stage": "early", "n_cells": 2},
    ]
    facts = generate(tmp_path / "all", inputs, cells=rows, shard_size=2)
    obs = read(tmp_path / "all", facts).obs
    assert obs["treated"].tolist() == [True] * 3 + [False] * 2
    assert obs["day"].tolist() == [7] * 3 + [1] * 2
    assert obs["stage"].cat.ordered
    assert list(obs["stage"].cat.categories) == ["early", "late"]
    facts = generate(tmp_path / "gaps", inputs, cells=[*rows, {"n_cells": 2}], shard_size=2)
    index = read_index(tmp_path / "gaps" / facts["index"])
    assert str(index["treated"].dtype) == "boolean"
    assert str(index["day"].dtype) == "Int64"
    assert index["stage"].cat.ordered
    shards = concat_obs([anndata.read_h5ad(tmp_path / "gaps" / s["file"]).obs for s in facts["shards"]])
    pd.testing.assert_frame_equal(index, shards)
    anndata.AnnData(obs=index).write_h5ad(tmp_path / "obs.h5ad")
