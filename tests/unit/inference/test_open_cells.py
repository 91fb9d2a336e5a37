"""Cells of many shards as one object: equal to their concatenation, lazy, and blind to what is not committed."""

from __future__ import annotations

import json
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.stages.cell_stages import models, real_cells, run_stage, write_soma

import scldm
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.inference.export.index import write_index
from scldm.cells import shards as cell_shards
from scldm.cells.cells import CellShardsError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("open")
    config = {"source": write_soma(root / "soma"), "model": {"vae": models(root)["vae"]}, "shard_size": 20}
    return run_stage("reconstruct", root / "stage", {**config, "decode": "both", "keep_obs": ["score"]})


@pytest.fixture
def folder(made, tmp_path):
    """A copy to spoil."""
    shutil.copytree(made, tmp_path / "stage")
    return tmp_path / "stage"


def concatenated(folder):
    shards = [anndata.read_h5ad(p) for p in sorted((folder / "cells").glob("part-*.h5ad"))]
    return anndata.concat(shards, merge="same", uns_merge="same")


def equal(a, b):
    # A slice of anndata forgets the categories that none of its cells has; ours keep the model's.
    def used(obs):
        return obs.assign(**{c: obs[c].cat.remove_unused_categories() for c in obs if obs[c].dtype == "category"})

    pd.testing.assert_frame_equal(used(a.obs), used(b.obs))
    pd.testing.assert_frame_equal(a.var, b.var)
    assert (a.X != b.X).nnz == 0
    np.testing.assert_array_equal(a.obsm["X_scldm"], b.obsm["X_scldm"])
    np.testing.assert_array_equal(a.layers["mean"], b.layers["mean"])


KEYS = {
    "all": slice(None),
    "inside a shard": slice(3, 9),
    "across shards": slice(15, 47),
    "with a step": slice(1, 70, 7),
    "backwards": slice(69, 10, -3),
    "positions in any order": [69, 0, 21, 20, 5],
    "from the end": [-1, -70],
    "nothing": slice(0, 0),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_slice_equals_that_of_the_concatenation(made, key):
    cells, whole = scldm.open_cells(made), concatenated(made)
    key_of_whole = [k % 70 for k in key] if isinstance(key, list) else key
    equal(cells[key], whole[key_of_whole].copy())


def test_masks_names_and_conditions_choose_cells(made):
    cells, whole = scldm.open_cells(made), concatenated(made)
    equal(cells[cells.obs["score"] > 0.5], whole[whole.obs["score"] > 0.5].copy())
    equal(cells[(cells.obs["score"] > 0.5).to_numpy()], whole[whole.obs["score"] > 0.5].copy())
    names = list(whole.obs_names[[40, 3]])
    equal(cells[names], whole[names].copy())
    chosen = (whole.obs["cell_type"] == "B") & whole.obs["donor"].isin(["d1"])
    equal(cells.where(cell_type="B", donor=["d1"]), whole[chosen].copy())


def cells_with(**columns):
    """Cells of which only obs is known."""
    cells = scldm.cells.cells.Cells.__new__(scldm.cells.cells.Cells)
    table = pd.DataFrame(columns)
    cells.__dict__ |= {"obs": table, "_ends": np.array([0, len(table)])}
    return cells


def test_a_condition_on_missing_values_keeps_the_other_conditions():
    cells = cells_with(a=["x", None, "y", None], b=[1, 1, 1, 2])
    assert cells.mask(a=None, b=1).tolist() == [False, True, False, False]
    assert cells.mask(a=["x", None], b=1).tolist() == [True, True, False, False]


FLOATS = np.array([0.1, 1, 10, np.nan], np.float32)


@pytest.mark.parametrize("value", [0.1, np.float32(0.1), np.float64(0.1), "0.1"], ids=lambda v: type(v).__name__)
def test_numbers_are_compared_by_the_name_of_their_class(value):
    cells = cells_with(dose=FLOATS, exact=FLOATS.astype(np.float64))
    assert cells.mask(dose=value).tolist() == [True, False, False, False]
    assert cells.mask(exact=value).tolist() == [True, False, False, False]
    assert cells.mask(dose=[value, None]).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("column", "value"),
    [("dose", 0.2), ("n", 3), ("n", 1.5), ("treated", 1), ("treated", "true"), ("text", ""), ("nothing", 1)],
)
def test_a_value_that_no_cell_has_is_refused_in_every_kind_of_column(column, value):
    table = {"dose": FLOATS, "n": [1, 2, 2, 2], "treated": [True, False, True, True], "text": list("abab")}
    cells = cells_with(**table, nothing=[None] * 4)
    with pytest.raises(KeyError, match=f"{column} has no class"):
        cells.mask(**{column: value})


def test_a_null_of_any_kind_asks_for_the_cells_without_a_value():
    cells = cells_with(dose=FLOATS, text=["x", None, "y", None])
    for null in (None, np.nan, pd.NA):
        assert cells.mask(dose=null).tolist() == [False, False, False, True]
        assert cells.mask(text=null).tolist() == [False, True, False, True]


def test_repeated_positions_give_repeated_cells(made):
    cells = scldm.open_cells(made)
    out = cells[[5, 5, 30]]
    assert list(out.obs_names) == [cells.obs_names[i] for i in (5, 5, 30)]
    np.testing.assert_array_equal(out.X[0].toarray(), out.X[1].toarray())


def test_sizes_and_batches(made):
    cells = scldm.open_cells(made)
    assert (cells.n_obs, cells.n_vars, cells.shape, len(cells)) == (70, 6, (70, 6), 70)
    parts = list(cells.batches(32))
    assert [p.n_obs for p in parts] == [32, 32, 6]
    equal(anndata.concat(parts, merge="same", uns_merge="same"), cells.to_anndata())
    assert "70 x 6 in 4 shards" in repr(cells)


def test_a_selection_has_the_categories_of_its_cells_in_their_order(made):
    cells = scldm.open_cells(made)
    assert list(cells.obs["cell_type"].cat.categories) == ["T", "B", "NK"]
    assert list(cells.where(cell_type=["NK", "T"]).obs["cell_type"].cat.categories) == ["T", "NK"]


def test_only_the_shards_that_are_asked_for_are_opened(made, monkeypatch):
    opened = []
    real = cell_shards._opened
    monkeypatch.setattr(cell_shards, "_opened", lambda shard: opened.append(shard.path.name) or real(shard))
    cells = scldm.open_cells(made)
    assert len(cells.obs) == 70
    assert opened == []
    cells[21:25]
    assert opened == ["part-00001.h5ad"]


def test_without_an_index_obs_comes_out_of_the_shards(folder):
    with_index = scldm.open_cells(folder).obs
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["facts"]["index"]
    path.write_text(json.dumps(manifest))
    (folder / "index.parquet").unlink()
    pd.testing.assert_frame_equal(scldm.open_cells(folder).obs, with_index)


@pytest.mark.row("G4")
def test_shards_that_the_manifest_does_not_list_are_not_there(folder):
    shutil.copy(folder / "cells" / "part-00000.h5ad", folder / "cells" / "part-00099.h5ad")
    assert scldm.open_cells(folder).n_obs == 70


def test_too_many_cells_are_not_brought_into_memory(made):
    with pytest.raises(CellShardsError, match="max_cells"):
        scldm.open_cells(made).to_anndata(max_cells=69)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (np.ones(3, bool), "one value per cell"),
        ([70], "whole numbers below 70"),
        ([0.5], "whole numbers below 70"),
        (["nobody"], "'nobody'"),
    ],
)
def test_keys_that_make_no_sense_are_refused(made, key, said):
    with pytest.raises((IndexError, KeyError), match=said):
        scldm.open_cells(made)[key]


def test_unknown_columns_and_classes_are_refused(made):
    cells = scldm.open_cells(made)
    with pytest.raises(KeyError, match="no column 'tissue'"):
        cells.where(tissue="lung")
    with pytest.raises(KeyError, match="no class 'b'"):
        cells.where(cell_type="b")


# ---- folders that are none of ours -------------------------------------------------------------------------------
def spoil(change):
    def do(folder):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return do


HOSTILE = {
    "half written": (lambda f: (f / "manifest.json").unlink(), "is not finished: 4 shards are committed"),
    "not JSON": (lambda f: (f / "manifest.json").write_text("{"), "is damaged"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "is not the manifest of a stage"),
    "newer": (spoil(lambda m: m["facts"].update(schema_version=9)), "schema_version 9"),
    "no shards": (spoil(lambda m: m["facts"].pop("shards")), "lists no .h5ad shards"),
    "arrow shards": (
        spoil(lambda m: m["facts"].update(shards={"train": [{"file": "a.arrow"}]}, )),
        "lists no .h5ad shards",
    ),
    "a way out": (spoil(lambda m: m["facts"]["shards"][0].update(file="../../x.h5ad")), "outside the folder"),
    "an absolute path": (spoil(lambda m: m["facts"]["shards"][0].update(file="/etc/x.h5ad")), "outside the folder"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_folder_that_holds_no_finished_cells_is_refused(folder, change, said):
    change(folder)
    with pytest.raises(CellShardsError, match=said):
        scldm.open_cells(folder)


def test_a_folder_that_is_not_there_and_one_above_a_stage_are_told_apart(folder, tmp_path):
    with pytest.raises(CellShardsError, match="no such folder"):
        scldm.open_cells(tmp_path / "nowhere")
    with pytest.raises(CellShardsError, match=f"did you mean {folder}"):
        scldm.open_cells(folder.parent)


def test_a_missing_or_damaged_shard_is_named_when_it_is_read(folder):
    (folder / "cells" / "part-00001.h5ad").unlink()
    (folder / "cells" / "part-00002.h5ad").write_bytes(b"no HDF5")
    cells = scldm.open_cells(folder)
    assert cells[:20].n_obs == 20
    with pytest.raises(CellShardsError, match=r"part-00001.h5ad is missing.*scldm cells verify"):
        cells[20:25]
    with pytest.raises(CellShardsError, match=r"part-00002.h5ad cannot be read"):
        cells[40:45]


def test_an_index_that_is_not_the_shards_is_refused(folder):
    obs = pd.read_parquet(folder / "index.parquet")
    obs.iloc[:10].to_parquet(folder / "index.parquet")
    with pytest.raises(CellShardsError, match="has 10 cells and the manifest 70"):
        scldm.open_cells(folder).obs  # noqa: B018


def test_shards_with_other_categories_make_one_table(tmp_path):
    records = []
    (tmp_path / "cells").mkdir()
    for k, kinds in enumerate((["a", "b"], ["b", "c"])):
        obs = pd.DataFrame({"kind": pd.Categorical(kinds), "n": [k, k]}, index=[f"{k}-0", f"{k}-1"])
        cells = anndata.AnnData(sp.csr_matrix(np.eye(2, dtype=np.int32)), obs=obs)
        cells.write_h5ad(tmp_path / "cells" / f"part-0000{k}.h5ad")
        records.append({"file": f"cells/part-0000{k}.h5ad", "n_cells": 2, "sha256": ""})
    index = write_index(tmp_path, records)
    facts = {"shards": records, "index": index, "n_cells": 4}
    write_manifest(Manifest("generate", "v", str(tmp_path), {}, {}, facts, 1.0, 1.0))
    obs = scldm.open_cells(tmp_path).obs
    assert list(obs["kind"]) == ["a", "b", "b", "c"]
    assert list(obs["kind"].cat.categories) == ["a", "b", "c"]


def test_the_order_is_the_inputs(made):
    assert list(scldm.open_cells(made).obs_names) == list(real_cells().obs_names)
