"""`scldm cells export | concat | head`: every sink holds what the shards hold."""

from __future__ import annotations

import json
import shutil
import warnings

import anndata
import numpy as np
import pytest
import scanpy as sc
import zarr
from helpers.stages.cell_stages import models, run_stage, write_soma
from helpers.stages.cells_commands import equal, reconstructed, run

import scldm
from pipeline.data.soma.store import SomaStore
from pipeline.inference.export import h5ad as single_file
from pipeline.inference.export import soma as soma_export
from pipeline.inference.export import zarr as collection
from scldm.cells.shards import CellShardsError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return reconstructed(tmp_path_factory.mktemp("stage"))


@pytest.fixture
def folder(made, tmp_path):
    """A copy to spoil."""
    shutil.copytree(made, tmp_path / "stage")
    return tmp_path / "stage"


def test_one_file_holds_what_the_shards_hold_and_scanpy_reads_it(made, tmp_path):
    result = run("concat", made, tmp_path / "all.h5ad")
    assert result.exit_code == 0, result.output
    cells = sc.read_h5ad(tmp_path / "all.h5ad")
    equal(cells, scldm.open_cells(made)[:])
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    assert np.isfinite(cells.X.data).all()
    assert run("concat", made, tmp_path / "all.h5ad").exit_code == 2  # never over another file


def test_cells_without_counts_go_to_one_file_too(tmp_path):
    config = {"source": write_soma(tmp_path / "soma"), "model": {"vae": models(tmp_path)["vae"]}, "shard_size": 30}
    stage = run_stage("embed", tmp_path / "stage", config)
    assert run("export", stage, tmp_path / "all.h5ad", "--to", "h5ad").exit_code == 0
    got = anndata.read_h5ad(tmp_path / "all.h5ad")
    assert got.X is None
    np.testing.assert_array_equal(got.obsm["X_scldm"], scldm.open_cells(stage)[:].obsm["X_scldm"])
    for sink, out in (("zarr", "a.zarr"), ("soma", "a.soma")):
        assert run("export", stage, tmp_path / out, "--to", sink).exit_code == 2


def test_too_many_cells_for_one_file_are_refused_with_what_to_do(made, tmp_path, monkeypatch):
    monkeypatch.setattr(single_file, "MAX_CELLS", 69)
    result = run("concat", made, tmp_path / "all.h5ad")
    assert result.exit_code == 2
    assert "cells.zarr --to zarr" in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_zarr_collection_is_laid_out_as_annbatch_reads_it(made, tmp_path):
    cells = scldm.open_cells(made)
    assert collection.export_zarr(cells, tmp_path / "c.zarr", cells_per_dataset=40) == 2
    group = zarr.open_group(tmp_path / "c.zarr", mode="r")
    assert {
        "encoding-type": "annbatch-preshuffled",
        "encoding-version": "0.1.0",
    }.items() <= group.attrs.asdict().items()
    assert sorted(group.keys()) == ["dataset_0", "dataset_1"]
    for name in ("X/data", "X/indices", "obsm/X_scldm"):
        array = group[f"dataset_0/{name}"]
        assert array.metadata.zarr_format == 3
        assert array.shards is not None
    parts = [anndata.read_zarr(tmp_path / "c.zarr" / f"dataset_{k}") for k in range(2)]
    equal(parts[0], cells[:40])
    equal(parts[1], cells[40:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.zarr"]


def test_a_shuffled_collection_holds_every_cell_once(made, tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "SLICE", 5)
    cells = scldm.open_cells(made)
    for name in ("a.zarr", "b.zarr"):
        collection.export_zarr(cells, tmp_path / name, shuffle=3, cells_per_dataset=40)
    a, b = (
        [n for k in range(2) for n in anndata.read_zarr(tmp_path / name / f"dataset_{k}").obs_names]
        for name in ("a.zarr", "b.zarr")
    )
    assert a == b
    assert a != list(cells.obs_names)
    assert sorted(a) == sorted(cells.obs_names)
    one = anndata.read_zarr(tmp_path / "a.zarr" / "dataset_1")
    assert (one.X != cells[list(one.obs_names)].X).nnz == 0


def test_a_killed_zarr_export_goes_on_behind_the_last_whole_dataset(made, tmp_path, monkeypatch):
    cells, real, wrote = scldm.open_cells(made), collection._write, []

    def dies(group, name, adata):
        if len(wrote) == 1:
            real(group, name, adata[:3].copy())  # half of it
            del group[name].attrs["scldm-complete"]
            raise KeyboardInterrupt
        wrote.append(name)
        real(group, name, adata)

    monkeypatch.setattr(collection, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        collection.export_zarr(cells, tmp_path / "c.zarr", cells_per_dataset=30)
    assert not (tmp_path / "c.zarr").exists()
    monkeypatch.setattr(collection, "_write", lambda g, name, a: wrote.append(name) or real(g, name, a))
    collection.export_zarr(cells, tmp_path / "c.zarr", cells_per_dataset=30)
    assert wrote == ["dataset_0", "dataset_1", "dataset_2"]
    assert anndata.read_zarr(tmp_path / "c.zarr" / "dataset_1").n_obs == 30


def test_a_soma_experiment_holds_what_the_shards_hold(made, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # tiledbsoma warns where a write is not what it should be
        assert run("export", made, tmp_path / "e.soma", "--to", "soma").exit_code == 0
    cells = scldm.open_cells(made)[:]
    store = SomaStore(str(tmp_path / "e.soma"))
    assert store.shape == (70, 6)
    obs = store.obs()
    assert list(obs["obs_id"]) == list(cells.obs_names)
    for column in cells.obs:
        assert list(obs[column]) == list(cells.obs[column])
    assert store.categories("cell_type") == ["T", "B", "NK"]
    rows = store.read_ragged(np.arange(70))
    np.testing.assert_array_equal(rows.indptr, cells.X.indptr)
    np.testing.assert_array_equal(rows.genes, cells.X.indices)
    np.testing.assert_array_equal(rows.counts, cells.X.data)
    np.testing.assert_array_equal(obs["raw_sum"], np.asarray(cells.X.sum(1)).ravel())
    latents = SomaStore(str(tmp_path / "e.soma"))._open("ms/RNA/obsm/X_scldm").read().tables().concat().to_pandas()
    z = latents.sort_values(["soma_dim_0", "soma_dim_1"])["soma_data"].to_numpy().reshape(70, -1)
    np.testing.assert_array_equal(z, cells.obsm["X_scldm"])
    assert list(store.var()["feature_id"]) == list(cells.var_names)


def test_a_killed_soma_export_goes_on_and_writes_no_count_twice(made, tmp_path, monkeypatch):
    cells, real = scldm.open_cells(made), soma_export.in_tile_order
    starts = []

    def dies(coo, first_row, tile):
        starts.append(first_row)
        if len(starts) == 3:
            raise KeyboardInterrupt
        return real(coo, first_row, tile)

    monkeypatch.setattr(soma_export, "in_tile_order", dies)
    with pytest.raises(KeyboardInterrupt):
        soma_export.export_soma(cells, tmp_path / "e.soma", rows_per_write=16)
    assert not (tmp_path / "e.soma").exists()
    soma_export.export_soma(cells, tmp_path / "e.soma", rows_per_write=16)
    assert starts == [0, 16, 32, 32, 48, 64]
    rows = SomaStore(str(tmp_path / "e.soma")).read_ragged(np.arange(70))
    np.testing.assert_array_equal(rows.counts, cells[:].X.data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.soma"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("c.zarr", "--to", "soma", "--shuffle", "1"), "--shuffle works only with --to zarr"),
        (("c", "--to", "zarr"), "ends in .zarr"),
    ],
)
def test_what_would_be_ignored_or_unreadable_is_refused(made, tmp_path, words, said):
    result = run("export", made, tmp_path / words[0], *words[1:])
    assert result.exit_code == 2
    assert said in result.output


def test_head_says_what_the_cells_are(made):
    result = run("head", made, "-n", "2")
    assert result.exit_code == 0, result.output
    assert "Cells 70 x 6 in 3 shards" in result.output
    assert "cell_type: " in result.output


def test_a_newer_manifest_is_refused_by_every_command(folder, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["facts"]["schema_version"] = 9
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for words in (("head", folder), ("verify", folder), ("concat", folder, tmp_path / "x.h5ad")):
        result = run(*words)
        assert result.exit_code == 2
        assert "upgrade it" in result.output
    with pytest.raises(CellShardsError):
        scldm.open_cells(folder)
