"""Jobs on real cells: what comes out is the input's, cell for cell, however it was cut; what is wrong is said first."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from cell_stages import here, models, real_cells, run_stage, write_cells, write_soma
from pydantic import ValidationError
from small_models import CELL_TYPES, DONORS, write_flow, write_vae

import scldm
from pipeline.job import STAGE_CONFIGS
from pipeline.stage import InputError
from scldm.batch import CellBatch
from scldm.checkpoints.native import load_flow, load_vae
from scldm.flow.config import SamplerConfig
from scldm.real_cells import to_noise, under_condition

ALL = {
    "embed": {},
    "reconstruct": {"decode": "both"},
    "perturb": {"to": {"cell_type": "NK"}, "flow": {"steps": 4}},
    "log_likelihood": {"flow": {"steps": 4, "probes": 2}},
}
USES_FLOW = ("perturb", "log_likelihood")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Cells and models, shared by all tests of this file."""
    root = tmp_path_factory.mktemp("real")
    return root, write_soma(root / "soma"), models(root)


def settings(place, stage, **more):
    _, source, folders = place
    model = folders if stage in USES_FLOW else {"vae": folders["vae"]}
    return {"source": source, "model": model, "shard_size": 40, **ALL[stage], **more}


def made(place, tmp_path, stage, *, pool=here, name="out", seed=0, **more):
    folder = run_stage(stage, tmp_path / name, settings(place, stage, **more), pool=pool, seed=seed)
    return scldm.open_cells(folder).to_anndata()


def equal(a, b):
    pd.testing.assert_frame_equal(a.obs, b.obs, check_exact=True)
    if a.X is not None:
        assert (a.X != b.X).nnz == 0
    for kind in ("obsm", "layers"):
        assert set(getattr(a, kind)) == set(getattr(b, kind))
        for key, values in getattr(a, kind).items():
            np.testing.assert_array_equal(values, getattr(b, kind)[key])


@pytest.mark.parametrize("stage", ALL)
def test_names_and_order_are_those_of_the_input(place, tmp_path, stage):
    out = made(place, tmp_path, stage)
    cells = real_cells()
    assert list(out.obs_names) == list(cells.obs_names)
    assert list(out.obs["cell_type"]) == list(cells.obs["cell_type"])
    assert tuple(out.obs["cell_type"].cat.categories) == CELL_TYPES.classes


@pytest.mark.parametrize("stage", ALL)
def test_what_is_read_at_once_changes_nothing(place, tmp_path, stage):
    small = made(place, tmp_path, stage, name="small", batch_size=7)
    large = made(place, tmp_path, stage, name="large", batch_size=1000)
    equal(small, large)


def test_a_file_and_the_same_cells_in_soma_give_the_same(place, tmp_path):
    source = {"type": "h5ad", "path": str(write_cells(tmp_path / "cells.h5ad"))}
    equal(made(place, tmp_path, "embed", source=source), made(place, tmp_path, "embed", name="soma"))
    assert not (tmp_path / "out" / "soma").exists()  # the copy that actors read is not left behind


@pytest.mark.parametrize("stage", ["embed", "perturb"])
def test_a_killed_job_makes_what_is_missing_and_nothing_else(place, tmp_path, stage):
    whole = made(place, tmp_path, stage, name="whole", shard_size=20)
    done = []

    def dies(todo, spec, context):
        for record in here(todo, spec, context):
            done.append(record["shard"])
            if len(done) == 2:
                raise KeyboardInterrupt
            yield record

    def watched(todo, spec, context):
        done.append(list(todo))
        yield from here(todo, spec, context)

    with pytest.raises(KeyboardInterrupt):
        made(place, tmp_path, stage, pool=dies, shard_size=20)
    cells = tmp_path / "out" / "cells"
    (cells / ".part-00002.h5ad.99.tmp").write_bytes(b"half")  # what a killed process was writing
    (cells / "part-00003.h5ad").write_bytes(b"renamed, and not recorded")
    with (cells / "part-00001.h5ad").open("r+b") as f:  # a record whose file is another
        f.seek(200)
        f.write(b"\0\1\2\3")
    again = made(place, tmp_path, stage, pool=watched, shard_size=20)
    assert done == [0, 1, [1, 2, 3]]
    equal(again, whole)
    assert not list(cells.glob(".*"))


def test_shards_of_another_input_do_not_count(place, tmp_path):
    _, _, folders = place
    path = write_cells(tmp_path / "cells.h5ad")
    config = {"source": {"type": "h5ad", "path": str(path)}, "model": {"vae": folders["vae"]}, "shard_size": 40}

    def dies(todo, spec, context):
        yield next(here(todo, spec, context))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage("embed", tmp_path / "out", config, pool=dies)
    other = real_cells(seed=5)
    write_cells(path, other)
    run_stage("embed", tmp_path / "out", config)
    fresh = run_stage("embed", tmp_path / "fresh", config)
    equal(scldm.open_cells(tmp_path / "out")[:], scldm.open_cells(fresh)[:])


# ---- numbers -----------------------------------------------------------------------------------------------------
def over_model_genes(vocabulary):
    cells = real_cells()
    return torch.tensor(cells[:, list(vocabulary.feature_ids)].X.toarray())


def test_latents_are_the_encoders_of_the_models_genes(place, tmp_path):
    _, _, folders = place
    vae = load_vae(Path(folders["vae"]))
    z = vae.vae.encode(CellBatch.from_dense(over_model_genes(vae.vocabulary))).flatten(1)
    np.testing.assert_allclose(made(place, tmp_path, "embed").obsm["X_scldm"], z.numpy(), atol=1e-5)


def test_a_reconstruction_has_the_decoders_mean_and_counts_drawn_around_it(place, tmp_path):
    _, _, folders = place
    vae = load_vae(Path(folders["vae"]))
    cells = CellBatch.from_dense(over_model_genes(vae.vocabulary))
    mu = vae.vae.decode(vae.vae.encode(cells), cells.library_size).mu
    out = made(place, tmp_path, "reconstruct")
    np.testing.assert_allclose(out.layers["mean"], mu.numpy(), rtol=1e-3, atol=1e-4)
    assert out.X.dtype == np.int32
    assert out.obs["is_synthetic"].all()
    np.testing.assert_array_equal(out.obs["library_size"], cells.library_size.numpy())
    other = made(place, tmp_path, "reconstruct", name="seed", seed=1)
    assert (out.X != other.X).nnz
    np.testing.assert_array_equal(out.layers["mean"], other.layers["mean"])


def test_the_negative_log_likelihood_is_the_vaes(place, tmp_path):
    _, _, folders = place
    vae = load_vae(Path(folders["vae"]))
    cells = CellBatch.from_dense(over_model_genes(vae.vocabulary))
    nll = vae.vae(cells)
    out = made(place, tmp_path, "log_likelihood", flow=None, model={"vae": folders["vae"]})
    np.testing.assert_allclose(out.obs["nll"], nll.numpy(), rtol=1e-4)
    np.testing.assert_allclose(out.obs["nll_per_gene"], nll.numpy() / 6, rtol=1e-4)
    assert "flow_log_prob" not in out.obs


def test_backwards_and_forwards_under_the_same_labels_is_the_same_cell(place, tmp_path):
    _, _, folders = place
    flow = load_flow(Path(folders["flow"]))
    with torch.no_grad():  # gentle weights: random ones make a field too wild for any number of steps
        for p in flow.dit.parameters():
            p.mul_(0.1)
    z = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    own = {"cell_type": torch.tensor([0, 1, 2, 3, 0]), "donor": torch.tensor([0, 1, 2, 0, 1])}
    sampler = SamplerConfig(solver="rk4", steps=40)
    back = under_condition(flow, z, own=own, target=own, sampler=sampler)
    torch.testing.assert_close(back, z, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(to_noise(flow, z, own, sampler), z, atol=1e-2)


def test_a_perturbation_changes_what_is_asked_and_keeps_the_rest(place, tmp_path):
    out = made(place, tmp_path, "perturb")
    assert set(out.obs["to_cell_type"]) == {"NK"}
    assert list(out.obs["donor"]) == list(real_cells().obs["donor"])
    noise = made(place, tmp_path, "perturb", name="noise", start="noise")
    other = made(place, tmp_path, "perturb", name="other", start="noise", to={"cell_type": None})
    assert not np.allclose(out.obsm["X_scldm"], noise.obsm["X_scldm"])
    assert not np.allclose(other.obsm["X_scldm"], noise.obsm["X_scldm"])
    assert set(other.obs["to_cell_type"]) == {""}


def test_fresh_noise_is_a_cells_own(place, tmp_path):
    """The cells of one donor get the same whether the others are there or not."""
    whole = made(place, tmp_path, "perturb", start="noise", shard_size=100)
    some = made(
        place, tmp_path, "perturb", name="some", start="noise", cells={"where": {"donor": "d1"}}, shard_size=100
    )
    np.testing.assert_allclose(whole[some.obs_names].obsm["X_scldm"], some.obsm["X_scldm"], atol=1e-3, rtol=1e-3)


def test_fewer_genes_are_drawn_by_seed(place, tmp_path):
    few = made(place, tmp_path, "embed", max_genes=3)
    again = made(place, tmp_path, "embed", name="again", max_genes=3, batch_size=5)
    other = made(place, tmp_path, "embed", name="other", max_genes=3, seed=1)
    np.testing.assert_array_equal(few.obsm["X_scldm"], again.obsm["X_scldm"])
    assert not np.allclose(few.obsm["X_scldm"], other.obsm["X_scldm"])
    assert set(few.obs["n_genes"]) - {3}  # obs tells the cell's own


# ---- what can be wrong -------------------------------------------------------------------------------------------
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
    model = {"vae": str(tmp_path / "gaussian")}
    assert "no counts can be drawn" in refused(place, tmp_path, "reconstruct", name="g", model=model)


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

    monkeypatch.setattr(reconstruct, "MOST_DENSE_BYTES", 240)
    assert "set shard_size=10 or less" in refused(place, tmp_path, "reconstruct")


def test_scanpy_reads_the_result(place, tmp_path):
    folder = run_stage("embed", tmp_path / "out", settings(place, "embed"))
    shard = anndata.read_h5ad(folder / "cells" / "part-00000.h5ad")
    assert shard.obsm["X_scldm"].shape == (40, 12)
    assert shard.uns["scldm"]["kind"] == "embed"
