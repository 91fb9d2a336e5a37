"""A Gaussian head makes log1p CP10k values, says so, and nothing takes them for counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models.small_models import vocabulary, write_flow, write_vae
from helpers.stages.cell_stages import models, real_cells, run_stage, write_soma
from helpers.stages.generation_case import generate, write_inputs

import scldm
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.inference.export.h5ad import export_h5ad
from pipeline.inference.export.soma import export_soma
from pipeline.inference.export.verify import verify
from pipeline.stages.evaluate import decode_cells, open_generated, read_generated
from scldm.checkpoints.convert.convert import convert_upstream
from scldm.checkpoints.convert.export import export_upstream
from scldm.checkpoints.native import load_vae
from scldm.checkpoints.untrusted.reader import ForeignCheckpoint
from scldm.checkpoints.upstream.inputs import InputFiles
from scldm.data.cell_counts import is_log_normalised
from scldm.errors import CheckpointError, InputError
from scldm.generation.expression_draw import draw_expression
from scldm.metrics.from_anndata import cell_set
from scldm.metrics.genes.expression import as_counts, log1p_cp10k
from scldm.metrics.genes.reconstruction import reconstruction_table
from scldm.metrics.resampling import Halves

REQUEST = [{"cell_type": "T", "n_cells": 30}, {"cell_type": "NK", "donor": "d1", "n_cells": 15}]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return models(tmp_path_factory.mktemp("gaussian"), head="gaussian", gene_bias=False)


@pytest.fixture(scope="module")
def model(pair):
    return scldm.load(pair["vae"], flow=pair["flow"])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("job")
    inputs = write_inputs(root, head="gaussian")
    facts = generate(root / "out", inputs, cells=REQUEST, seed=7, shard_size=20)
    write_manifest(Manifest("generate", "v", str(root / "out"), {}, {}, facts, 1.0, 1.0))
    return root


def assert_no_counts_columns(cells: anndata.AnnData) -> None:
    assert is_log_normalised(cells.uns)
    assert cells.X.dtype == np.float32
    assert "total_counts" not in cells.obs


def test_a_value_is_its_mean_and_a_standard_normal_of_its_own():
    mu = np.array([[0.0, 5.0, 2.0]] * 20_000, np.float32)
    noise = draw_expression(mu, np.arange(20_000), seed=1, stream=3).toarray() - mu
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(noise.std(0), 1, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(3), atol=0.03)
    some = draw_expression(mu[5:8], [5, 6, 7], seed=1, stream=3, genes=np.array([0, 2])).toarray()
    np.testing.assert_array_equal(some, (noise + mu)[5:8][:, [0, 2]])
    assert (draw_expression(mu[:3], [0, 1, 2], seed=2, stream=3).toarray() != (noise + mu)[:3]).all()


def test_a_notebook_generates_log_normalised_values(model):
    cells = model.generate(REQUEST, seed=7)
    assert_no_counts_columns(cells)
    assert "library_size" not in cells.obs
    assert cells.shape == (45, 6)
    assert cells.obs["cell_type"].value_counts().to_dict() == {"T": 30, "NK": 15}
    np.testing.assert_array_equal(model.generate(REQUEST, seed=7).X.toarray(), cells.X.toarray())
    few = model.generate(REQUEST, seed=7, genes=["g1", "g4"])
    np.testing.assert_array_equal(few.X.toarray(), cells.X.toarray()[:, [1, 4]])


def test_values_are_means_unless_a_draw_is_asked_for(model):
    means, draws = (model.generate(REQUEST, seed=7, sampler={"expression": e}) for e in ("mean", "draw"))
    np.testing.assert_array_equal(means.X.toarray(), model.generate(REQUEST, seed=7).X.toarray())
    assert means.X.nnz == means.n_obs * means.n_vars
    noise = draws.X.toarray() - means.X.toarray()
    assert abs(noise.mean()) < 0.2
    assert abs(noise.std() - 1) < 0.2
    assert [x.uns["scldm"]["expression"] for x in (means, draws)] == ["mean", "draw"]


def test_a_draw_of_expression_is_refused_where_counts_are_drawn(tmp_path):
    counts = scldm.load(write_vae(tmp_path / "vae"), flow=write_flow(tmp_path / "flow"))
    with pytest.raises(InputError, match=r"sampler.expression \(draw\): the VAE draws counts"):
        counts.generate({"cell_type": "T"}, n=2, sampler={"expression": "draw"})
    inputs = write_inputs(tmp_path / "in")
    with pytest.raises(InputError, match=r"generate: sampler.expression \(draw\): the VAE draws counts"):
        generate(tmp_path / "out", inputs, n_cells=4, sampler={"expression": "draw"})


def test_settings_that_only_counts_have_are_refused_together(model):
    with pytest.raises(InputError) as error:
        model.generate({"cell_type": "T"}, n=2, library_size=5000, sampler={"temperature": 0.5})
    assert "library_size (5000): the VAE has a gaussian head" in str(error.value)
    assert "temperature (0.5): the VAE has a gaussian head" in str(error.value)
    with pytest.raises(InputError, match="library_size in row 1 of the conditions"):
        model.generate([{"cell_type": "T", "library_size": 9, "n_cells": 2}])


def test_a_reconstruction_is_drawn_around_the_decoded_mean(model):
    made = model.reconstruct(real_cells(), mean=True, seed=1)
    assert_no_counts_columns(made)
    noise = made.X.toarray() - made.layers["mean"]
    assert abs(noise.mean()) < 0.2
    assert abs(noise.std() - 1) < 0.2


def test_counts_have_no_likelihood(model):
    with pytest.raises(CheckpointError, match="counts have no likelihood"):
        model.log_likelihood(real_cells())


def test_values_are_scored_on_their_own_scale(model):
    made, real = model.generate({"cell_type": "T"}, n=70, seed=1), real_cells()
    found = scldm.score(made, real=real, label="cell_type")
    assert found.attrs["scale"] == "log1p_cp10k"
    assert set(found.attrs["left_out"]) == {"library_size_ks", "genes_per_cell_ks", "zero_fraction_difference"}
    assert not set(found.attrs["left_out"]) & set(found.index)
    assert {"w2", "auroc", "label_accuracy"} <= set(found.index)
    assert np.isfinite(found[["generated", "floor"]].to_numpy(float)).all()
    assert found.loc["w2", "generated"] > 1.5 * found.loc["w2", "floor"]  # weights are random
    as_real = real[:, made.var_names].copy()
    as_real.X = np.log1p(as_real.X.toarray() / as_real.X.toarray().sum(1, keepdims=True) * 1e4)
    as_real.uns = made.uns
    again = scldm.score(as_real, real=real, label="cell_type").loc["w2"]
    assert again["generated"] < 1.2 * again["floor"]  # real cells over the model's genes, on that scale


def test_real_cells_are_needed_with_their_counts(model):
    made = model.generate(n=70)
    with pytest.raises(InputError, match="real holds log1p CP10k values"):
        scldm.score(made, real=made)


def test_a_job_writes_what_the_notebook_makes(job):
    cells = scldm.open_cells(job / "out")[:]
    assert_no_counts_columns(cells)
    ours = scldm.load(job / "train_vae" / "model", flow=job / "train_flow" / "model").generate(REQUEST, seed=7)
    np.testing.assert_array_equal(cells.X.toarray(), ours.X.toarray())
    assert verify(job / "out").problems == []


def test_exports_keep_the_values_or_refuse(job, tmp_path):
    cells = scldm.open_cells(job / "out")
    export_h5ad(cells, tmp_path / "cells.h5ad")
    written = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert_no_counts_columns(written)
    np.testing.assert_array_equal(written.X.toarray(), cells[:].X.toarray())
    with pytest.raises(InputError, match="X/raw takes counts"):
        export_soma(cells, tmp_path / "soma")


def test_evaluate_reads_the_values_and_their_scale(job):
    cells = open_generated(SimpleNamespace(folder=job / "out"), pd.Index(vocabulary().feature_ids))
    some = cell_set(read_generated(cells, max_cells=20, rng=np.random.default_rng(0)), ["cell_type"])
    assert (some.n_cells, some.counted) == (20, False)
    assert (some.values.data % 1 != 0).all()


def test_a_vae_with_a_gaussian_head_decodes_to_means_without_likelihood(pair):
    cells = real_cells()[:, list(vocabulary().feature_ids)].copy()
    decoded = decode_cells(load_vae(Path(pair["vae"])), cells, n_cells=30)
    assert decoded.mu.shape == (30, 6)
    assert decoded.nll is None
    assert decoded.draws is None
    halves = Halves.draw(np.full(30, ""), 4, np.random.default_rng(0))
    counts = as_counts(cells.X)[decoded.rows]
    table = reconstruction_table(counts, decoded.mu, halves, refits=2, counted=False)
    assert set(table) == {f"reconstruction_{k}" for k in ("gene_pearson", "cell_pearson", "mse")}
    error = ((log1p_cp10k(counts).toarray() - decoded.mu) ** 2).mean()
    assert table["reconstruction_mse"].value == pytest.approx(error)


def test_a_job_refuses_a_library_size_before_any_shard(job, tmp_path):
    inputs = write_inputs(tmp_path / "in", head="gaussian")
    with pytest.raises(InputError, match=r"generate: library_size \(500\)"):
        generate(tmp_path / "out", inputs, n_cells=4, library_size=500)
    assert list((tmp_path / "out" / "cells").iterdir()) == []


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("reconstruct", {"decode": "both"}),
        ("perturb", {"to": {"cell_type": "NK"}, "flow": {"steps": 4}}),
        ("perturb", {"to": {"cell_type": "NK"}, "flow": {"steps": 4}, "start": "noise"}),
    ],
)
def test_jobs_on_real_cells_write_log_normalised_values(pair, tmp_path, stage, settings):
    own = pair if stage == "perturb" else {"vae": pair["vae"]}
    folder = run_stage(stage, tmp_path / "out", {"source": write_soma(tmp_path / "soma"), "model": own, **settings})
    cells = scldm.open_cells(folder)[:]
    assert_no_counts_columns(cells)
    assert (cells.X.toarray() < 0).any()
    assert verify(folder).problems == []


def test_means_alone_are_marked_too(pair, tmp_path):
    settings = {"source": write_soma(tmp_path / "soma"), "model": {"vae": pair["vae"]}, "decode": "mean"}
    cells = scldm.open_cells(run_stage("reconstruct", tmp_path / "out", settings))[:]
    assert cells.X is None
    assert is_log_normalised(cells.uns)


def test_a_converted_checkpoint_without_size_factors_generates(tmp_path):
    """A Gaussian head has no library size, so upstream's files of them are not needed."""
    exported = export_upstream(
        write_vae(tmp_path / "vae", head="gaussian"), write_flow(tmp_path / "flow"), tmp_path / "upstream"
    ).folder
    whole = torch.load(exported / "model.ckpt", weights_only=True)
    foreign = ForeignCheckpoint(whole["state_dict"], {k: v for k, v in whole.items() if k != "state_dict"}, {}, ())
    done = convert_upstream(
        exported / "model.ckpt", exported / "config.yaml", tmp_path / "back",
        given=InputFiles(no_size_factors=True), foreign=foreign,
    )  # fmt: skip
    model = scldm.load(done.vae, flow=done.flow)
    cells = model.generate({"cell_type": "B"}, n=3, seed=1)
    assert_no_counts_columns(cells)
    assert cells.shape == (3, 6)
