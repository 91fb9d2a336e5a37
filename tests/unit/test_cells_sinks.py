"""`scldm cells`: what verify finds, and that every sink holds what the shards hold."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import zarr
from cell_stages import models, run_stage, write_soma
from generation_case import generate, write_inputs
from typer.testing import CliRunner

import scldm
from pipeline.cells import export_h5ad as single_file
from pipeline.cells import export_zarr as collection
from pipeline.cells.verify import verify
from pipeline.cli import app
from pipeline.data import soma_export
from pipeline.data.soma import SomaStore
from pipeline.generation import read_request
from pipeline.job import GenerateConfig
from pipeline.stage import Manifest, write_manifest
from scldm.cell_shards import CellsError
from scldm.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("sinks")
    config = {"source": write_soma(root / "soma"), "model": {"vae": models(root)["vae"]}, "shard_size": 30}
    return run_stage("reconstruct", root / "stage", config)


@pytest.fixture
def folder(made, tmp_path):
    """A copy to spoil."""
    shutil.copytree(made, tmp_path / "stage")
    return tmp_path / "stage"


def run(*words):
    return CliRunner().invoke(app, ["cells", *map(str, words)])


def rewrite(folder, k, change):
    """Change a shard and make the manifest agree with its bytes: what only a look inside can find."""
    path = folder / "cells" / f"part-{k:05d}.h5ad"
    adata = anndata.read_h5ad(path)
    changed = change(adata)
    (adata if changed is None else changed).write_h5ad(path)
    rehash(folder, k)


def rehash(folder, k):
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "cells" / f"part-{k:05d}.h5ad").read_bytes()
    manifest["facts"]["shards"][k]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


# ---- verify ------------------------------------------------------------------------------------------------------
def test_whole_cells_are_whole(made, tmp_path):
    result = run("verify", made, "--json", tmp_path / "verdict.json")
    assert result.exit_code == 0, result.output
    assert "70 cells in 3 shards: whole" in result.output
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["ok"]
    assert verdict["problems"] == []


def flip_a_bit(folder):
    path = folder / "cells" / "part-00001.h5ad"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def name_twice(adata):
    adata.obs_names = [adata.obs_names[0], adata.obs_names[0], *adata.obs_names[2:]]


def negative(adata):
    x = adata.X.tolil()
    x[0, 0] = -3
    adata.X = x.tocsr()


def fractions(adata):
    adata.X = adata.X.astype(np.float32) * 0.5


def not_a_number(adata):
    adata.obsm["X_scldm"][2, 1] = np.nan


def no_size(adata):
    adata.obs["library_size"] = np.nan


def other_genes(adata):
    adata.var_names = [f"other{i}" for i in range(adata.n_vars)]


FAULTS = {
    "a flipped bit": (flip_a_bit, "part-00001.h5ad"),
    "a deleted shard": (lambda f: (f / "cells" / "part-00002.h5ad").unlink(), "part-00002.h5ad is missing"),
    "a name twice": (lambda f: rewrite(f, 0, name_twice), "1 obs names occur more than once"),
    "a negative count": (lambda f: rewrite(f, 0, negative), "1 values of X are negative"),
    "fractions": (lambda f: rewrite(f, 1, fractions), "are not whole numbers"),
    "NaN in latents": (lambda f: rewrite(f, 1, not_a_number), "obsm['X_scldm'] holds 1 values that are NaN"),
    "NaN in obs": (lambda f: rewrite(f, 1, no_size), "library_size is not finite in 30 cells"),
    "a lost cell": (lambda f: rewrite(f, 0, lambda a: a[1:].copy()), "holds 29 cells, the manifest says 30"),
    "other genes": (lambda f: rewrite(f, 1, other_genes), "part-00001.h5ad has other genes than the first"),
    "a swapped order": (lambda f: rewrite(f, 1, lambda a: a[::-1].copy()), "index.parquet does not name the cells"),
    "another sum": (
        lambda f: rewrite(f, 0, lambda a: a.obs.__setitem__("total_counts", a.obs["total_counts"] + 1)),
        "total_counts differs from the sum of X in 30 cells",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_is_found(folder, spoil, said):
    spoil(folder)
    result = run("verify", folder)
    assert result.exit_code == 1, result.output
    assert said in result.output


def test_all_that_is_wrong_is_found_at_once(folder):
    flip_a_bit(folder)
    (folder / "cells" / "part-00002.h5ad").unlink()
    rewrite(folder, 0, negative)
    assert len([p for p in verify(folder).problems if p.startswith("part-")]) >= 3


def test_offsets_of_rows_that_do_not_rise_are_found(folder):
    with h5py.File(folder / "cells" / "part-00000.h5ad", "r+") as f:
        f["X/indptr"][3] = f["X/indptr"][-1] + 5
    rehash(folder, 0)
    assert any("no valid row offsets" in p for p in verify(folder).problems)


def test_a_folder_that_is_no_stage_is_bad_input(tmp_path, folder):
    assert run("verify", tmp_path / "nowhere").exit_code == 2
    (folder / "manifest.json").unlink()
    result = run("verify", folder)
    assert result.exit_code == 2
    assert "is not finished" in result.output


# ---- verify against the request ----------------------------------------------------------------------------------
@pytest.fixture
def generated(folder, tmp_path):
    """The same cells as if they had been generated for a table of their own composition."""
    obs = scldm.open_cells(folder).obs
    vocabulary = Vocabulary.load(Path(models(tmp_path)["vae"]) / "vocabulary.json")
    table = obs.groupby(["cell_type", "donor"], observed=True).size().reset_index(name="n_cells")
    rows = [{"cell_type": a, "donor": b, "n_cells": int(n)} for a, b, n in table.itertuples(index=False)]
    ingest = tmp_path / "line" / "ingest" / "i1"
    ingest.mkdir(parents=True)
    vocabulary.save(ingest / "vocabulary.json")
    write_manifest(Manifest("ingest", "i1", str(ingest), {}, {}, {"vocabulary": "vocabulary.json"}, 1.0, 1.0))
    place = tmp_path / "line" / "generate" / "g1"
    place.parent.mkdir()
    folder.rename(place)
    config = GenerateConfig(cells=rows)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest |= {"stage": "generate", "inputs": {"ingest": "i1"}, "config": config.model_dump(mode="json")}
    manifest["facts"]["request_digest"] = read_request(config, vocabulary, {}).digest
    (place / "manifest.json").write_text(json.dumps(manifest))
    return place


def test_cells_of_each_condition_are_counted_against_the_request(generated):
    assert verify(generated).problems == []
    assert verify(generated).not_checked == []

    def change_one(adata):
        old = adata.obs["cell_type"].iloc[0]
        adata.obs.loc[adata.obs_names[0], "cell_type"] = "NK" if old != "NK" else "T"

    rewrite(generated, 0, change_one)
    problems = verify(generated).problems
    assert len(problems) == 2  # one condition lacks a cell, another has one too many
    assert all("were asked for" in p for p in problems)


def test_a_request_that_cannot_be_read_again_is_said_not_to_be_checked(generated):
    manifest = json.loads((generated / "manifest.json").read_text())
    manifest["facts"]["request_digest"] = "another"
    (generated / "manifest.json").write_text(json.dumps(manifest))
    assert "no longer the one that was asked for" in verify(generated).not_checked[0]
    shutil.rmtree(generated.parent.parent / "ingest")
    result = run("verify", generated)
    assert result.exit_code == 0
    assert "not checked: cells per condition: its ingest i1 is not beside it" in result.output


# ---- sinks -------------------------------------------------------------------------------------------------------
def equal(a, b):
    pd.testing.assert_frame_equal(a.obs, b.obs)
    assert list(a.var_names) == list(b.var_names)
    assert (a.X != b.X).nnz == 0
    np.testing.assert_array_equal(a.obsm["X_scldm"], b.obsm["X_scldm"])


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
    monkeypatch.setattr(single_file, "MOST", 69)
    result = run("concat", made, tmp_path / "all.h5ad")
    assert result.exit_code == 2
    assert "--to zarr or soma" in result.output
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
        (("c.zarr", "--to", "soma", "--shuffle", "1"), "--shuffle is of --to zarr"),
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
    with pytest.raises(CellsError):
        scldm.open_cells(folder)


def test_what_the_generate_stage_made_is_opened_and_counted_against_its_request(tmp_path):
    inputs = write_inputs(tmp_path / "inputs")
    place, ingest = tmp_path / "line" / "generate" / "g1", tmp_path / "line" / "ingest" / "0"
    ingest.parent.mkdir(parents=True)
    shutil.copytree(tmp_path / "inputs" / "ingest", ingest)
    write_manifest(Manifest("ingest", "0", str(ingest), {}, {}, inputs["ingest"].facts, 1.0, 1.0))
    asked = {"cells": [{"cell_type": "T", "n_cells": 70}, {"donor": "d1", "n_cells": 50}], "shard_size": 32}
    facts = generate(place, inputs, **asked)
    config = GenerateConfig.model_validate(asked).model_dump(mode="json")
    write_manifest(Manifest("generate", "g1", str(place), config, {"ingest": "0"}, facts, 1.0, 1.0))
    cells = scldm.open_cells(place)
    assert cells.shape == (120, 6)
    assert cells.where(cell_type="T").n_obs == 70
    assert cells.where(cell_type=None, donor="d1").n_obs == 50
    shards = [anndata.read_h5ad(p) for p in sorted((place / "cells").glob("*.h5ad"))]
    equal(cells[:], anndata.concat(shards, merge="same", uns_merge="same"))
    verdict = verify(place)
    assert (verdict.problems, verdict.not_checked) == ([], [])
