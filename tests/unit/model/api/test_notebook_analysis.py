"""Real cells in a notebook: denoised expression, corrected counts, ways between cells, comparisons of groups."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from helpers.models.small_models import CELL_TYPES, DONORS, GENES, write_flow, write_vae
from helpers.stages.cell_stages import models, real_cells

import scldm
from scldm.api.analysis.expression import check_dense_fits
from scldm.api.analysis.interpolation import spherical
from scldm.api.arguments import ArgumentError
from scldm.errors import CheckpointError
from scldm.flow.config import Distilled, SamplerConfig
from scldm.flow.sampler import sample_latents
from scldm.generation.real_cells import fresh_noise
from scldm.generation.request_table import RequestError


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models(root)
    return scldm.load(root)


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory):
    root = tmp_path_factory.mktemp("gaussian")
    models(root, head="gaussian")
    return scldm.load(root)


# ---- denoised expression -------------------------------------------------------------------------------------------
def test_denoised_expression_is_the_decoders_mean_at_the_library_size(model):
    cells = real_cells()
    means = model.reconstruct(cells, mean=True).layers["mean"]
    observed = model.normalized_expression(cells, library_size="observed")
    np.testing.assert_array_equal(observed.X, means)
    at = model.normalized_expression(cells, library_size=500)
    np.testing.assert_allclose(at.X, 500 * means / means.sum(1, keepdims=True), rtol=1e-4)
    assert at.X.dtype == np.float32
    assert at.obs.equals(cells.obs)
    np.testing.assert_array_equal(at.obsm["X_scldm"], model.encode(cells).obsm["X_scldm"])
    assert at.uns["scldm"]["library_size"] == 500


def test_only_the_genes_that_are_named_are_stored(model):
    cells = real_cells()
    some = model.normalized_expression(cells, only_genes=["G4", "g1"])
    whole = model.normalized_expression(cells)
    assert some.var_names.tolist() == ["g1", "g4"]
    np.testing.assert_array_equal(some.X, whole[:, ["g1", "g4"]].X)


def test_a_gaussian_head_gives_its_mean_and_refuses_a_library_size(gaussian):
    cells = real_cells()
    found = gaussian.normalized_expression(cells)
    assert found.uns["scldm"]["scale"] == "mean of log1p CP10k"
    np.testing.assert_array_equal(found.X, gaussian.reconstruct(cells, mean=True).layers["mean"])
    for size in (500, "observed"):
        with pytest.raises(ArgumentError, match="library_size must be 10000: the model has a gaussian head"):
            gaussian.normalized_expression(cells, library_size=size)


def test_expression_that_does_not_fit_is_refused_before_any_cell_is_decoded():
    with pytest.raises(RequestError, match=r"takes 112 GiB; this machine has 16\. .*at most 2,147"):
        check_dense_fits(1_000_000, 30_000, memory=2**34)
    check_dense_fits(1_000_000, 2_147, memory=2**34)


# ---- corrected counts ----------------------------------------------------------------------------------------------
def test_corrected_cells_are_those_of_perturb_and_the_reference_stays_as_measured(model):
    cells = real_cells()
    corrected = model.transform(cells, {"donor": "d1"}, seed=3)
    perturbed = model.perturb(cells, {"donor": "d1"}, counts="changed", seed=3)
    stay = (cells.obs["donor"] == "d1").to_numpy()
    assert 0 < stay.sum() < cells.n_obs
    np.testing.assert_array_equal(corrected.X[~stay].toarray(), perturbed.X[~stay].toarray())
    np.testing.assert_array_equal(corrected.obsm["X_scldm"][~stay], perturbed.obsm["X_scldm"][~stay])
    np.testing.assert_array_equal(corrected.X[stay].toarray(), cells[stay, list(GENES)].X.toarray())
    np.testing.assert_array_equal(corrected.obsm["X_scldm"][stay], model.encode(cells).obsm["X_scldm"][stay])
    assert corrected.X.dtype == np.int32
    assert corrected.obs_names.tolist() == cells.obs_names.tolist()
    assert corrected.obs[list(cells.obs)].equals(cells.obs)
    assert corrected.obs["is_synthetic"].tolist() == (~stay).tolist()
    assert corrected.uns["scldm"]["kind"] == "transform"


def test_cells_that_agree_in_one_label_of_two_are_changed(model):
    cells = real_cells()
    corrected = model.transform(cells, {"donor": "d1", "cell_type": "B"})
    same = ((cells.obs["donor"] == "d1") & (cells.obs["cell_type"] == "B")).tolist()
    assert corrected.obs["is_synthetic"].tolist() == [not x for x in same]


def test_what_transform_cannot_do_is_named(model, gaussian):
    with pytest.raises(RequestError, match="donor has None"):
        model.transform(real_cells(), {"donor": None})
    with pytest.raises(RequestError, match="no class 'd3'"):
        model.transform(real_cells(), {"donor": "d3"})
    with pytest.raises(RequestError, match="has a gaussian head"):
        gaussian.transform(real_cells(), {"donor": "d1"})
    assert gaussian.perturb(real_cells(), {"donor": "d1"}).n_obs == 70


# ---- ways between cells --------------------------------------------------------------------------------------------
def test_a_way_begins_and_ends_at_the_cells_themselves(model):
    cells = real_cells()
    way = model.interpolate(cells[:3], cells[3:6], n=4)
    own = model.encode(cells).obsm["X_scldm"]
    at = {k: way.obsm["X_scldm"][np.isclose(way.obs["place"], k)] for k in (0.0, 1.0)}
    np.testing.assert_allclose(at[0.0], own[:3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(at[1.0], own[3:6], rtol=1e-5, atol=1e-6)
    assert way.obs["pair"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert way.obs["from"].tolist()[::4] == cells.obs_names[:3].tolist()
    np.testing.assert_allclose(way.layers["mean"].sum(1), 1e4, rtol=1e-4)
    assert way.X.dtype == np.int32


def test_one_cell_is_paired_with_each_of_many_and_other_numbers_are_refused(model):
    cells = real_cells()
    way = model.interpolate(cells[0], cells[1:4], n=2)
    assert way.obs["from"].nunique() == 1
    assert way.obs["to"].nunique() == 3
    with pytest.raises(RequestError, match="a has 2 cells and b 3"):
        model.interpolate(cells[:2], cells[2:5])
    with pytest.raises(RequestError, match="both be cells, or both conditions"):
        model.interpolate(cells[:2], {"cell_type": "B"})
    assert model.perturb(cells[:2], {"cell_type": "B"}).n_obs == 2


def test_a_way_between_conditions_keeps_the_noise_and_ends_at_each(model):
    way = model.interpolate({"cell_type": "B"}, {"cell_type": "NK"}, n=3, cells=2, seed=5)
    flow, sampler = model.flow, SamplerConfig(solver="midpoint", steps=20)
    for place, name in ((0.0, "B"), (1.0, "NK")):
        ids = {
            "cell_type": torch.tensor(flow.vocabulary.label("cell_type").encode([name] * 2)),
            "donor": torch.tensor(flow.vocabulary.label("donor").encode([None] * 2)),
        }
        expected = sample_latents(flow.dit, fresh_noise(flow, [0, 1], seed=5), ids, sampler, flow.path).flatten(1)
        found = way.obsm["X_scldm"][(way.obs["place"] == place).to_numpy()]
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    assert way.obs["to"].unique().tolist() == ["cell_type=NK"]


def test_the_arc_keeps_the_length_of_noise_and_a_line_does_not():
    g = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(200, 16, 16, generator=g) for _ in range(2))
    length = spherical(x0, x1, 0.5).flatten(1).norm(dim=1).mean()
    assert abs(length - 16) < 0.3
    assert ((x0 + x1) / 2).flatten(1).norm(dim=1).mean() < 12
    torch.testing.assert_close(spherical(x0, x1, 0.0), x0)
    torch.testing.assert_close(spherical(x0, x1, 1.0), x1)
    torch.testing.assert_close(spherical(x0, x0, 0.3), x0)


# ---- two groups ----------------------------------------------------------------------------------------------------
def test_on_random_halves_nothing_is_found_more_often_than_is_said(model):
    """The networks have random weights: an arbitrary function of a cell, with other library sizes in one half."""
    found = {"counts": [], "denoised": []}
    for seed in range(40):
        cells, rng = real_cells(80, seed), np.random.default_rng(seed)
        first = rng.permutation(80) < 40
        x = 20 * cells.X.toarray()
        x[first] = rng.binomial(x[first].astype(int), 0.4)
        cells.X, cells.obs["half"] = sp.csr_matrix(x.astype(np.float32)), np.where(first, "a", "b")
        for evidence, of in found.items():
            table = model.differential_expression(
                cells, "half", "a", "b", evidence=evidence, n_permutations=199, seed=seed
            )
            of.append(table["p_value"].to_numpy())
    for evidence, of in found.items():
        assert (np.stack(of) <= 0.05).mean() < 0.12, evidence  # 240 values that depend on each other


def test_a_comparison_has_a_row_of_each_gene_and_says_how_it_was_made(model):
    cells = real_cells()
    table = model.differential_expression(cells, "cell_type", "B", ["T", "NK"], seed=2)
    assert sorted(table.index) == sorted(GENES)
    assert table["p_value"].is_monotonic_increasing
    assert ((table["low"] < table["log2_fold_change"]) & (table["log2_fold_change"] < table["high"])).all()
    assert table["probability"].between(0, 1).all()
    assert (table["p_adjusted"] >= table["p_value"]).all()
    rest = model.differential_expression(cells, "cell_type", "B", seed=2)
    assert rest.equals(table)
    n = (cells.obs["cell_type"] == "B").sum()
    assert (table.attrs["scldm"]["n1"], table.attrs["scldm"]["n2"]) == (n, 70 - n)
    np.testing.assert_allclose(
        table["log2_fold_change"], np.log2((table["mean1"] + 1) / (table["mean2"] + 1)), rtol=1e-6
    )


def test_more_generated_cells_do_not_make_a_difference_significant(model):
    """What separates generated from real cells, and the number of real cells, remain in the error."""
    cells = real_cells()
    few, many = (
        model.differential_expression(cells, "cell_type", "B", "T", method="generated", n=n) for n in (50, 800)
    )
    assert many["se"].min() > 0.5 * few["se"].min()
    assert (many["p_value"] >= 0.001).all(), "the networks are random, and so are the labels of these cells"


def test_what_a_comparison_cannot_use_is_named_together(model, gaussian):
    cells = real_cells()
    with pytest.raises(ArgumentError) as error:
        model.differential_expression(cells, "cell_type", "Bcell", "T", evidence="count", delta=-1)
    assert "no cell has 'Bcell'" in str(error.value)
    assert "evidence must be" in str(error.value)
    assert "delta must be" in str(error.value)
    with pytest.raises(
        ArgumentError, match=r"groupby must be a column of obs; got 'celltype'.*did you mean 'cell_type'"
    ):
        model.differential_expression(cells, "celltype", "B")
    with pytest.raises(ArgumentError, match=r"group1 and group2 share \d+ cells"):
        model.differential_expression(cells, "cell_type", ["B", "T"], "B")
    cells.obs["few"] = np.where(np.arange(70) < 2, "x", "y")
    cells.obs["score > 0.5"] = cells.obs["score"] > 0.5
    with pytest.raises(ArgumentError, match="group1 has 2 cells"):
        model.differential_expression(cells, "few", "x")
    with pytest.raises(ArgumentError, match="a label of the model for method='generated'"):
        model.differential_expression(cells, "score > 0.5", "True", method="generated")
    assert len(model.differential_expression(cells, "score > 0.5", True, method="posterior")) == len(GENES)
    with pytest.raises(CheckpointError, match="gaussian head"):
        gaussian.differential_expression(cells, "cell_type", "B")


def test_a_distilled_flow_has_no_way_between_cells(tmp_path):
    write_vae(tmp_path / "vae", CELL_TYPES, DONORS, genes_seq_len=None)
    write_flow(tmp_path / "flow", CELL_TYPES, DONORS, distilled=Distilled(evaluations=2, guidance=1.0, teacher="t"))
    own = scldm.load(tmp_path / "vae", flow=tmp_path / "flow")
    with pytest.raises(ArgumentError, match="distilled"):
        own.interpolate(real_cells()[:2], real_cells()[2:4])
