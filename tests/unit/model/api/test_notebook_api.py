"""The notebook API: the cells and numbers of the batch jobs, and errors that say how to fix them."""

from __future__ import annotations

import doctest
import importlib
import json

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from helpers.models.small_models import CELL_TYPES, DONORS, GENES, write_flow, write_vae
from helpers.stages.cell_stages import models, real_cells, run_stage, write_cells
from helpers.stages.generation_case import generate, write_inputs

import scldm
from scldm.data.cell_counts import CellsError
from scldm.errors import CheckpointError
from scldm.generation.request_table import RequestError

REQUEST = [{"cell_type": "B", "donor": "d1", "n_cells": 33}, {"cell_type": "T", "n_cells": 20, "guidance": 2.0}]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # as the actors of the jobs that are compared with


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models(root)
    return root


@pytest.fixture(scope="module")
def model(folder):
    return scldm.load(folder)


# ---- the same as jobs ----------------------------------------------------------------------------------------------
def test_cells_are_those_of_a_generate_job_to_the_last_bit(tmp_path):
    inputs = write_inputs(tmp_path)
    facts = generate(tmp_path / "job", inputs, cells=REQUEST, seed=7, shard_size=30)
    shards = [anndata.read_h5ad(tmp_path / "job" / s["file"]) for s in facts["shards"]]
    assert len(shards) == 2
    job = anndata.concat(shards, merge="same")
    ours = scldm.load(tmp_path / "train_vae" / "model", flow=tmp_path / "train_flow" / "model")
    cells = ours.generate(REQUEST, seed=7)
    np.testing.assert_array_equal(cells.X.toarray(), job.X.toarray())
    np.testing.assert_array_equal(cells.obsm["X_scldm"], job.obsm["X_scldm"])
    assert list(cells.var_names) == list(job.var_names)
    pd.testing.assert_frame_equal(
        cells.obs.reset_index(drop=True), job.obs.drop(columns="gen_shard").reset_index(drop=True)
    )


def test_another_seed_gives_other_cells_and_the_same_seed_the_same(model):
    first, again, other = (model.generate({"cell_type": "B"}, n=40, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.obsm["X_scldm"], again.obsm["X_scldm"])
    assert list(first.obs_names) == list(again.obs_names)
    assert (first.obsm["X_scldm"] != other.obsm["X_scldm"]).any()
    assert not set(first.obs_names) & set(other.obs_names)


def test_latents_are_those_of_an_embed_job(model, folder, tmp_path):
    path = write_cells(tmp_path / "cells.h5ad")
    job = _job("embed", tmp_path, folder, path, model={"vae": str(folder / "vae")})
    encoded = model.encode(anndata.read_h5ad(path))
    assert list(encoded.obs_names) == list(job.obs_names)
    np.testing.assert_array_equal(encoded.obsm["X_scldm"], job.obsm["X_scldm"])


def test_reconstructions_and_likelihoods_are_those_of_jobs(model, folder, tmp_path):
    path = write_cells(tmp_path / "cells.h5ad")
    adata = anndata.read_h5ad(path)
    job = _job("reconstruct", tmp_path, folder, path, model={"vae": str(folder / "vae")}, decode="both")
    ours = model.reconstruct(adata, mean=True, seed=0)
    np.testing.assert_array_equal(ours.X.toarray(), job.X.toarray())
    np.testing.assert_array_equal(ours.layers["mean"], job.layers["mean"])
    pair = {"vae": str(folder / "vae"), "flow": str(folder / "flow")}
    job = _job("log_likelihood", tmp_path, folder, path, model=pair, flow={"probes": 2})
    ours = model.log_likelihood(adata, flow=True, probes=2, seed=0)
    for column in ("nll", "nll_per_gene", "flow_log_prob"):
        np.testing.assert_array_equal(ours[column].to_numpy(), job.obs[column].to_numpy())


def _job(stage, tmp_path, folder, path, **settings):
    source = {"type": "h5ad", "path": str(path)}
    return scldm.open_cells(run_stage(stage, tmp_path / stage, {"source": source, **settings})).to_anndata()


# ---- cells in ------------------------------------------------------------------------------------------------------
def test_genes_are_found_by_name_whatever_their_order(model):
    adata = real_cells()
    encoded = model.encode(adata.copy()).obsm["X_scldm"]
    turned = model.encode(adata[:, ::-1].copy()).obsm["X_scldm"]
    np.testing.assert_array_equal(encoded, turned)


def test_symbols_a_column_and_a_layer_are_used_if_requested(model):
    adata = real_cells()
    wanted = model.encode(adata.copy()).obsm["X_scldm"]
    other = adata.copy()
    other.var["ids"] = [f"{x}" for x in other.var_names]
    other.var_names = [f"row-{i}" for i in range(other.n_vars)]
    other.layers["counts"], other.X = other.X, np.log1p(other.X.toarray())
    np.testing.assert_array_equal(model.encode(other, layer="counts", genes="ids").obsm["X_scldm"], wanted)
    by_symbol = adata.copy()
    by_symbol.var_names = [x.upper() for x in by_symbol.var_names]
    np.testing.assert_array_equal(model.encode(by_symbol, match="symbol").obsm["X_scldm"], wanted)


def test_a_view_is_copied_and_an_anndata_is_filled(model):
    adata = real_cells()
    assert model.encode(adata) is adata
    view = adata[:10]
    encoded = model.encode(view)
    assert encoded is not view
    np.testing.assert_allclose(encoded.obsm["X_scldm"], adata.obsm["X_scldm"][:10], rtol=0, atol=1e-5)


def test_latents_do_not_depend_on_the_other_cells(model):
    adata = real_cells()
    whole = model.encode(adata).obsm["X_scldm"]
    np.testing.assert_allclose(model.encode(adata[:33].copy()).obsm["X_scldm"], whole[:33], rtol=0, atol=1e-5)


def test_unusable_cells_are_refused_with_a_fix(model):
    adata = real_cells()
    logged = adata.copy()
    logged.X = np.log1p(adata.X.toarray())
    logged.layers["counts"] = adata.X
    with pytest.raises(
        CellsError, match=r"no raw counts, the first is \d\.\d+ in cell cell-\d+.*their layer \(counts\)"
    ):
        model.encode(logged)
    with pytest.raises(CellsError, match="no layer 'umis'; there are: counts"):
        model.encode(logged, layer="umis")
    with pytest.raises(CellsError, match="there is no raw; there are layers: counts"):
        model.encode(logged, layer="raw")
    with pytest.raises(CellsError, match=r"6 of the model's 6 genes are not in the data.*match='symbol'"):
        model.encode(anndata.AnnData(adata.X, var=pd.DataFrame(index=[f"y{i}" for i in range(8)])))
    with pytest.raises(CellsError, match="1 genes more than once"):
        model.encode(anndata.concat([adata, adata[:, :1]], axis=1, join="outer"))
    with pytest.raises(CellsError, match="var has no column 'ids'"):
        model.encode(adata, genes="ids")
    empty = adata.copy()
    empty.X = sp.csr_matrix(adata.shape, dtype=np.float32)
    with pytest.raises(CellsError, match="70 cells express none of the model's genes"):
        model.encode(empty)


def test_classes_that_the_model_does_not_know_are_named(model):
    adata = real_cells()
    adata.obs["cell_type"] = "neuron"
    with pytest.raises(CellsError, match="cell_type has no class 'neuron'"):
        model.log_likelihood(adata, flow=True)
    assert model.log_likelihood(adata).shape == (70, 2)  # the VAE needs no label


# ---- conditions ----------------------------------------------------------------------------------------------------
def test_conditions_may_be_a_dictionary_a_table_or_nothing(model):
    assert model.generate(n=3).obs["cell_type"].isna().all()
    table = pd.DataFrame({"cell_type": ["B", None], "n_cells": [2, 3]}, index=[5, 5])
    cells = model.generate(table)
    assert cells.obs["cell_type"].tolist()[:2] == ["B", "B"]
    assert cells.obs["cell_type"].cat.categories.tolist() == ["B"]  # scanpy refuses groups without cells
    assert model.generate([{"cell_type": "B"}, {"donor": "d1"}], n=2).n_obs == 4
    assert model.generate(n=0).shape == (0, len(GENES))


def test_only_the_requested_genes_are_kept_and_their_counts_do_not_change(model):
    whole = model.generate(n=40, seed=3)
    some = model.generate(n=40, seed=3, genes=["g4", "G1"])
    assert list(some.var_names) == ["g1", "g4"]
    np.testing.assert_array_equal(some.X.toarray(), whole[:, ["g1", "g4"]].X.toarray())


def test_settings_change_the_cells(model):
    plain = model.generate({"cell_type": "B"}, n=32)
    assert model.generate({"cell_type": "B"}, n=32, library_size=50).obs["library_size"].unique().tolist() == [50.0]
    for other in ({"guidance": 3.0}, {"sampler": {"solver": "euler", "steps": 3}}):
        assert (model.generate({"cell_type": "B"}, n=32, **other).obsm["X_scldm"] != plain.obsm["X_scldm"]).any()


def test_all_problems_of_a_request_are_reported_together(model):
    with pytest.raises(RequestError) as error:
        model.generate(
            pd.DataFrame({"cell_type": ["b"], "donr": ["d1"], "n_cells": [-1]}), genes=["g9"], guidance={"tissue": 2.0}
        )
    for words in ("no class 'b'", "no label 'donr'", "n_cells must be whole numbers", "no gene 'g9'", "'tissue'"):
        assert words in str(error.value)
    with pytest.raises(RequestError, match="how many cells"):
        model.generate({"cell_type": "B"})


# ---- folders -------------------------------------------------------------------------------------------------------
def test_a_pipeline_and_its_stages_lead_to_the_models_that_belong_together(tmp_path):
    root = tmp_path / "runs" / "demo"
    for version in ("old", "new"):
        write_vae(root / "train_vae" / version / "model", CELL_TYPES, DONORS, genes_seq_len=None)
        _manifest(root / "train_vae" / version, "train_vae", {"model": "model"}, {})
    write_flow(root / "train_flow" / "f" / "model", CELL_TYPES, DONORS)
    _manifest(root / "train_flow" / "f", "train_flow", {"model": "model"}, {"train_vae": "old"})
    _manifest(root / "generate" / "g", "generate", {}, {"train_vae": "new", "train_flow": "f"})
    _manifest(root / "embed" / "e", "embed", {}, {"train_vae": "new"})
    flow = root / "train_flow" / "f"
    for place in (root, flow, root / "generate" / "g", flow / "model"):
        assert scldm.load(place).folders.vae == root / "train_vae" / "old" / "model", place
        assert scldm.load(place).folders.flow == flow / "model"
    assert scldm.load(root / "embed" / "e").flow is None
    assert scldm.load(root / "train_vae" / "new").flow is None


def test_a_flow_that_was_trained_with_its_vae_takes_that_one(tmp_path):
    stage = tmp_path / "train_flow" / "f"
    write_flow(stage / "model", CELL_TYPES)
    write_vae(stage / "vae_ema", CELL_TYPES, genes_seq_len=None)
    write_vae(stage / "vae_raw", CELL_TYPES, genes_seq_len=None)
    _manifest(stage, "train_flow", {"model": "model", "vae": {"ema": "vae_ema", "raw": "vae_raw"}}, {})
    assert scldm.load(stage).folders.vae == stage / "vae_ema"
    assert scldm.load(stage, weights="raw").folders.vae == stage / "vae_raw"


def _manifest(folder, stage, facts, inputs):
    folder.mkdir(parents=True, exist_ok=True)
    text = {"stage": stage, "facts": facts, "inputs": inputs, "finished_at": float(folder.name == "new")}
    (folder / "manifest.json").write_text(json.dumps(text))


def test_a_folder_without_models_is_refused_with_a_hint(tmp_path, folder):
    with pytest.raises(CheckpointError, match="is no folder"):
        scldm.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="or hf://czi/scldm-census for the hub"):
        scldm.load("czi/scldm-census")
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config.json.*no finished train_vae or train_flow"):
        scldm.load(tmp_path / "other")
    _manifest(tmp_path / "ingest" / "a", "ingest", {}, {})
    with pytest.raises(CheckpointError, match="a stage ingest, which has no model"):
        scldm.load(tmp_path / "ingest" / "a")
    _manifest(tmp_path / "evil", "train_vae", {"model": "../../vae"}, {})
    with pytest.raises(CheckpointError, match="outside the folder"):
        scldm.load(tmp_path / "evil")
    with pytest.raises(CheckpointError, match="has no flow"):
        scldm.load(folder / "vae").generate(n=1)


# ---- hub layout ----------------------------------------------------------------------------------------------------
def test_a_saved_model_generates_the_same_cells_and_has_a_card(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "mine")
    again = scldm.Model.from_pretrained(folder)
    np.testing.assert_array_equal(again.generate(n=8).X.toarray(), model.generate(n=8).X.toarray())
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: scldm\n")
    for words in ("6 genes", "`cell_type`: T, B, NK", "synthetic", "Licence"):
        assert words in card
    assert json.loads((folder / "model_index.json").read_text())["flow"] == "flow"


def test_a_folder_of_other_files_is_never_replaced(model, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(CheckpointError, match="not written by save_pretrained: choose another folder"):
        model.save_pretrained(tmp_path / "mine", force=True)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"another folder, or pass force=True") as error:
        model.save_pretrained(tmp_path / "other")
    assert "--" not in str(error.value)
    model.save_pretrained(tmp_path / "other", force=True)


# ---- scores --------------------------------------------------------------------------------------------------------
def test_real_cells_score_at_the_floor_and_noise_far_from_it():
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.5, 4.0, (3, 60))
    real = anndata.AnnData(sp.csr_matrix(rng.poisson(rates[rng.integers(3, size=300)]).astype(np.float32)))
    same = anndata.AnnData(sp.csr_matrix(rng.poisson(rates[rng.integers(3, size=150)]).astype(np.float32)))
    noise = anndata.AnnData(sp.csr_matrix(rng.poisson(rates.mean(0), (150, 60)).astype(np.float32)))
    near, far = scldm.score(same, real=real, n_pcs=5), scldm.score(noise, real=real, n_pcs=5)
    assert near.loc["w2", "generated"] < 1.5 * near.loc["w2", "floor"]
    assert far.loc["w2", "generated"] > 1.5 * far.loc["w2", "floor"]
    assert far.loc["coverage", "generated"] < near.loc["coverage", "generated"]


def test_labels_of_generated_cells_are_judged_by_real_ones():
    rng = np.random.default_rng(0)
    rates, kinds = rng.gamma(0.5, 8.0, (3, 60)), rng.integers(3, size=450)
    obs = pd.DataFrame({"kind": pd.Categorical.from_codes(kinds, ["a", "b", "c"])}).set_axis(map(str, range(450)))
    cells = anndata.AnnData(sp.csr_matrix(rng.poisson(rates[kinds]).astype(np.float32)), obs=obs)
    real, right = cells[:300].copy(), cells[300:].copy()
    wrong = right.copy()
    wrong.obs["kind"] = pd.Categorical.from_codes((kinds[300:] + 1) % 3, ["a", "b", "c"])
    accuracy = [scldm.score(x, real=real, label="kind", n_pcs=5).loc["label_accuracy"] for x in (right, wrong)]
    assert accuracy[0]["generated"] > 0.9 > 0.1 > accuracy[1]["generated"]
    assert accuracy[0]["floor"] > 0.9


def test_scores_of_unlike_cells_are_refused(model):
    cells = model.generate(n=60)
    adata = real_cells()[:, 1:-2].copy()
    with pytest.raises(CellsError, match=r"lack 1 of 6 genes.*\n.*no column 'tissue'"):
        scldm.score(cells, real=adata, label="tissue")


@pytest.mark.parametrize("side", ["generated", "real"])
def test_values_that_are_no_counts_are_refused_on_both_sides_of_a_score(model, side):
    cells = {"generated": model.generate(n=60), "real": real_cells()[:, 1:-1].copy()}
    cells[side] = anndata.AnnData(sp.csr_matrix(cells[side].X).log1p(), obs=cells[side].obs, var=cells[side].var)
    with pytest.raises(CellsError, match=rf"^{side}: \d+ values are no raw counts, the first is .* in cell") as error:
        scldm.score(cells["generated"], real=cells["real"])
    assert ("layer=" in str(error.value)) == (side == "real")


def test_a_layer_of_real_counts_is_scored(model):
    real = real_cells()
    counts, logs = real.X.copy(), sp.csr_matrix(real.X).log1p()
    real = anndata.AnnData(logs, obs=real.obs, var=real.var, layers={"umi": counts})
    assert len(scldm.score(model.generate(n=60), real=real, layer="umi"))


def test_cells_on_disk_give_the_results_of_cells_in_memory(model, tmp_path):
    path = write_cells(tmp_path / "cells.h5ad")
    dense = anndata.read_h5ad(path)
    dense.X = dense.X.toarray()
    dense.write_h5ad(tmp_path / "dense.h5ad")
    whole, made = anndata.read_h5ad(path), model.generate(n=60)
    for place in (path, tmp_path / "dense.h5ad"):
        backed = anndata.read_h5ad(place, backed="r")
        np.testing.assert_array_equal(model.encode(backed).obsm["X_scldm"], model.encode(whole).obsm["X_scldm"])
        np.testing.assert_array_equal(model.encode(backed[:9]).obsm["X_scldm"], whole.obsm["X_scldm"][:9])
        np.testing.assert_array_equal(model.reconstruct(backed).X.toarray(), model.reconstruct(whole).X.toarray())
        pd.testing.assert_frame_equal(model.log_likelihood(backed), model.log_likelihood(whole))
        pd.testing.assert_frame_equal(scldm.score(made, real=backed), scldm.score(made, real=whole))


def test_genes_in_another_order_and_classes_of_cells_give_the_same_scores(model):
    real, made = real_cells(), model.generate(n=60)
    kept = real.obs_names[real.obs["cell_type"].notna()] if "cell_type" in real.obs else real.obs_names
    expected = scldm.score(made, real=real[kept].copy())
    for other in (
        real[kept].copy()[:, ::-1].copy(),
        real[kept].copy()[:, ::-1],
        real[kept],
        real[kept][:, real.var_names],
    ):
        pd.testing.assert_frame_equal(scldm.score(made, real=other), expected)


def test_a_view_that_anndata_cannot_read_is_refused_with_another_way(model):
    real = real_cells()
    view = real[np.arange(real.n_obs) >= 0][:, ::-1]  # a fault of scipy: rows by position, columns backwards
    for name, call in (
        ("real", lambda: scldm.score(model.generate(n=60), real=view)),
        ("adata", lambda: model.encode(view)),
    ):
        with pytest.raises(CellsError, match=rf"^{name}: anndata cannot read .* one after the other"):
            call()


def test_aligned_cells_and_generated_ones_are_of_the_same_genes_whatever_the_file_calls_them(model):
    cells = real_cells(20)
    renamed = cells[:, ::-1].copy()
    renamed.var["ensembl"] = list(renamed.var_names)
    renamed.var_names = [f"symbol-{i}" for i in range(renamed.n_vars)]
    made = model.generate({"cell_type": "B"}, n=5, seed=1)
    aligned = model.align(renamed)  # by the column of var that holds the model's genes
    np.testing.assert_array_equal(aligned.X.toarray(), model.align(renamed, genes="ensembl").X.toarray())
    both = anndata.concat([aligned, made])
    assert both.shape == (25, made.n_vars)
    np.testing.assert_array_equal(aligned.X.toarray(), model.align(cells).X.toarray())
    assert aligned.obs.equals(renamed.obs)


MODULES = [
    "scldm.api.model",
    "scldm.api.scoring",
    *(f"scldm.api.methods.{x}" for x in ("core", "real_cells", "analyses", "generated")),
]


# ---- documents -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_are_true(name, model, folder, tmp_path):
    module = importlib.import_module(name)
    globs = {**vars(module), "np": np, "model": model, "adata": real_cells(), "folder": folder, "tmp": tmp_path}
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    tests = [t for t in finder.find(module, name, globs=globs) if t.examples]
    assert tests
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
