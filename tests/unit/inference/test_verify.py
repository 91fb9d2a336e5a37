"""`scldm cells verify`: what is wrong is found, all of it, and what is whole is called whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from helpers.stages.cell_stages import models
from helpers.stages.cells_commands import equal, reconstructed, rehash, rewrite, run
from helpers.stages.generation_case import generate, write_inputs

import scldm
from pipeline.config.job import GenerateConfig
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.inference.export.verify import verify
from pipeline.inference.request import read_request
from scldm.data.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return reconstructed(tmp_path_factory.mktemp("stage"))


@pytest.fixture
def folder(made, tmp_path):
    """A copy to spoil."""
    shutil.copytree(made, tmp_path / "stage")
    return tmp_path / "stage"


def test_whole_cells_are_whole(made, tmp_path):
    result = run("verify", made, "--json", tmp_path / "verdict.json")
    assert result.exit_code == 0, result.output
    assert "70 cells in 3 shards: complete and intact" in result.output
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
    "a swapped order": (lambda f: rewrite(f, 1, lambda a: a[::-1].copy()), "index.parquet does not list the cells"),
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
    assert all("were requested" in p for p in problems)


def test_a_request_that_cannot_be_read_again_is_said_not_to_be_checked(generated):
    manifest = json.loads((generated / "manifest.json").read_text())
    manifest["facts"]["request_digest"] = "another"
    (generated / "manifest.json").write_text(json.dumps(manifest))
    assert "no longer the one of the request" in verify(generated).not_checked[0]
    shutil.rmtree(generated.parent.parent / "ingest")
    result = run("verify", generated)
    assert result.exit_code == 0
    assert "not checked: cells per condition: its ingest i1 is not in the same output folder" in result.output


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
