"""Jobs on real cells: what is wrong with cells, labels, genes or settings is said first, and all at once."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
from helpers.models.small_models import CELL_TYPES, DONORS, write_flow, write_vae
from helpers.stages.cell_stages import real_cells, run_stage, write_cells
from helpers.stages.real_cell_jobs import cells_and_models, made, settings
from pydantic import ValidationError

from pipeline.config.job import STAGE_CONFIGS
from scldm.errors import InputError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return cells_and_models(tmp_path_factory.mktemp("real"))


def refused(place, tmp_path, stage, adata=None, **more):
    if adata is not None:
        more["source"] = {
            "type": "h5ad",
            "path": str(write_cells(tmp_path / "bad.h5ad", adata)),
            **more.pop("file", {}),
        }
    with pytest.raises(InputError) as error:
        made(place, tmp_path, stage, **more)
    return str(error.value)


def test_cells_whose_labels_the_model_does_not_know_are_named(place, tmp_path):
    cells = real_cells()
    cells.obs["cell_type"] = cells.obs["cell_type"].astype(str).replace({"NK": "NKK"})
    cells.obs["donor"] = cells.obs["donor"].astype(object)
    cells.obs.iloc[3, 1] = None
    first = cells.obs_names[cells.obs["cell_type"] == "NKK"][0]
    message = refused(place, tmp_path, "perturb", cells, to={"donor": "d1"})
    assert f"(first: {first}" in message
    assert "no class 'NKK' (did you mean 'NK'?)" in message
    assert f"1 cells have no donor (first: {cells.obs_names[3]})" in message
    lenient = made(place, tmp_path, "perturb", name="lenient", unknown_labels="none", to={"donor": "d1"},
                   source={"type": "h5ad", "path": str(tmp_path / "bad.h5ad")})  # fmt: skip
    assert lenient.n_obs == 70


def test_a_missing_label_column_is_named_with_how_to_map_it(place, tmp_path):
    cells = real_cells()
    cells.obs = cells.obs.rename(columns={"donor": "patient"})
    message = refused(place, tmp_path, "log_likelihood", cells)
    assert "no column 'donor'" in message
    assert "source.columns: {donor:" in message
    assert "ingest" not in message
    mapped = {"type": "h5ad", "path": str(tmp_path / "bad.h5ad"), "columns": {"donor": "patient"}}
    assert made(place, tmp_path, "log_likelihood", name="mapped", source=mapped).n_obs == 70


def test_cells_without_a_gene_of_the_model_are_named_or_left_out(place, tmp_path):
    cells = real_cells()
    x = cells.X.tolil()
    x[[4, 50], 1:7] = 0
    cells.X = x.tocsr()
    message = refused(place, tmp_path, "embed", cells)
    assert f"1 cells express none of the model's genes (first: {cells.obs_names[4]})" in message
    out = made(place, tmp_path, "embed", name="drop", empty_cells="drop",
               source={"type": "h5ad", "path": str(tmp_path / "bad.h5ad")})  # fmt: skip
    assert list(out.obs_names) == [n for i, n in enumerate(cells.obs_names) if i not in (4, 50)]


@pytest.mark.parametrize("stage", ["embed", "log_likelihood"])
def test_a_shard_whose_cells_were_all_left_out_has_the_columns_of_the_others(place, tmp_path, stage):
    cells = real_cells()
    x = cells.X.tolil()
    x[:35, 1:7] = 0  # the first of two shards
    cells.X = x.tocsr()
    cells.write_h5ad(tmp_path / "bad.h5ad")
    source = {"type": "h5ad", "path": str(tmp_path / "bad.h5ad")}
    out = made(place, tmp_path, stage, name="drop", empty_cells="drop", shard_size=35, source=source)
    assert out.n_obs == 35
    assert out.obs["library_size"].notna().all()


def test_genes_of_another_organism_are_refused(place, tmp_path):
    cells = real_cells()
    cells.var_names = [f"ENSMUSG{i:011d}" for i in range(8)]
    message = refused(place, tmp_path, "embed", cells)
    assert "6 of 6 genes" in message
    assert "genes.max_missing" in message


def test_all_that_is_wrong_is_said_at_once(place, tmp_path):
    cells = real_cells()
    cells.var_names = [f"other{i}" for i in range(8)]
    cells.obs["cell_type"] = "Z"
    message = refused(place, tmp_path, "perturb", cells)
    assert "6 of 6 genes" in message
    assert "no class 'Z'" in message


def test_repeated_names_are_refused_and_those_of_several_files_told_apart(place, tmp_path):
    cells = real_cells()
    cells.obs_names = ["same", "same", *cells.obs_names[2:]]
    assert "1 obs names occur more than once (first: same)" in refused(place, tmp_path, "embed", cells)
    (tmp_path / "many").mkdir()
    for name in ("a", "b"):
        write_cells(tmp_path / "many" / f"{name}.h5ad", real_cells())
    out = made(place, tmp_path, "embed", name="both", source={"type": "h5ad", "path": str(tmp_path / "many")})
    assert list(out.obs_names[:2]) == [f"a:{n}" for n in real_cells().obs_names[:2]]
    assert out.obs_names.is_unique
    assert out.n_obs == 140


def test_values_that_are_no_counts_are_refused(place, tmp_path):
    cells = real_cells()
    cells.X = cells.X * 0.5
    assert "not whole numbers" in refused(place, tmp_path, "embed", cells)


def test_a_kept_column_comes_through_and_an_absent_one_is_named(place, tmp_path):
    np.testing.assert_allclose(
        made(place, tmp_path, "embed", keep_obs=["score"]).obs["score"], real_cells().obs["score"]
    )
    assert "'scoer' (did you mean 'score'?" in refused(place, tmp_path, "embed", keep_obs=["scoer"])


def test_a_kept_column_never_gives_way_to_one_of_the_output(place, tmp_path):
    cells = real_cells()
    cells.obs["n_genes"] = 7
    said = refused(place, tmp_path, "embed", cells, keep_obs=["score", "n_genes"])
    assert "keep_obs: n_genes: the output has columns of its own" in said


@pytest.mark.parametrize(
    ("stage", "more", "said"),
    [
        ("perturb", {"to": {"cell_type": "NKK"}}, "to.cell_type: cell_type has no class 'NKK' (did you mean 'NK'?)"),
        ("perturb", {"to": {"tissue": "lung"}}, "to.tissue: no label 'tissue'"),
        ("perturb", {"guidance": {"cell_type": 2.0}}, "guidance has no scale for the label donor"),
    ],
)
def test_a_target_that_the_model_does_not_know_is_refused(place, tmp_path, stage, more, said):
    assert said in refused(place, tmp_path, stage, **more)


def test_models_that_do_not_belong_together_are_refused(place, tmp_path):
    model = {"vae": place[2]["vae"], "flow": str(write_flow(tmp_path / "flow", CELL_TYPES))}
    assert "different vocabularies" in refused(place, tmp_path, "log_likelihood", model=model)
    write_vae(tmp_path / "gaussian", CELL_TYPES, DONORS, genes_seq_len=None, head="gaussian")
    model = {"vae": str(tmp_path / "gaussian"), "flow": place[2]["flow"]}
    assert "counts have no likelihood under it" in refused(place, tmp_path, "log_likelihood", name="g", model=model)
    assert not (tmp_path / "g" / "cells").exists()


@pytest.mark.parametrize(
    ("stage", "wrong", "said"),
    [
        ("embed", {"model": {"vae": "v", "flow": "f"}}, "is not used by this job"),
        ("perturb", {"model": {"vae": "v"}, "to": {"a": "b"}}, "this job uses one"),
        ("perturb", {"to": {}}, "at least 1"),
        ("perturb", {"to": {"a": "b"}, "start": "noise", "max_genes": 5}, "encodes nothing"),
        ("log_likelihood", {"unknown_labels": "none"}, "does not ask for"),
        ("embed", {"genes": {"presence": True}}, "Extra inputs"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(stage, wrong, said):
    with pytest.raises(ValidationError, match=said):
        STAGE_CONFIGS[stage].model_validate({"source": {"type": "synthetic"}, **wrong})


def test_a_cell_with_more_genes_than_a_model_of_upstream_takes_is_named(place, tmp_path):
    model = {"vae": str(write_vae(tmp_path / "upstream", CELL_TYPES, DONORS, genes_seq_len=4))}
    message = refused(place, tmp_path, "embed", model=model)
    cells = real_cells()[:40]
    expressed = np.asarray((cells[:, 1:7].X > 0).sum(1)).ravel()
    assert f"(first: {cells.obs_names[expressed > 4][0]}" in message
    assert "set max_genes=4" in message
    assert made(place, tmp_path, "embed", name="few", model=model, max_genes=4).n_obs == 70


def test_unmeasured_genes_are_left_out_of_likelihood_and_mean(place, tmp_path):
    cells = real_cells()[:, [g != "g5" for g in real_cells().var_names]].copy()
    source = {"type": "h5ad", "path": str(write_cells(tmp_path / "few.h5ad", cells))}
    zero = made(place, tmp_path, "reconstruct", source=source)
    masked = made(place, tmp_path, "reconstruct", name="masked", source=source, genes={"presence": True})
    g5 = list(zero.var_names).index("g5")
    assert (np.asarray(masked.layers["mean"])[:, g5] == 0).all()
    assert (np.asarray(zero.layers["mean"])[:, g5] > 0).any()
    np.testing.assert_allclose(masked.layers["mean"].sum(1), masked.obs["library_size"], rtol=1e-4)


def test_dense_means_of_a_large_shard_are_refused_with_a_size_that_fits(place, tmp_path, monkeypatch):
    from pipeline.stages import reconstruct

    monkeypatch.setattr(reconstruct, "MAX_DENSE_BYTES", 240)
    assert "set shard_size=10 or less" in refused(place, tmp_path, "reconstruct")


def test_scanpy_reads_the_result(place, tmp_path):
    folder = run_stage("embed", tmp_path / "out", settings(place, "embed"))
    shard = anndata.read_h5ad(folder / "cells" / "part-00000.h5ad")
    assert shard.obsm["X_scldm"].shape == (40, 12)
    assert shard.uns["scldm"]["kind"] == "embed"
