"""An adaLN decoder decodes under vectors that its user gives: upstream defines no source of them, nothing guesses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.stages.cell_stages import models, real_cells, run_stage, write_soma
from helpers.stages.generation_case import generate

import scldm
from pipeline.config.io.loader import load_job
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.workflow.preflight import check_settings
from scldm.errors import InputError

ROWS = [{"cell_type": "T", "n_cells": 3}, {"cell_type": "NK", "n_cells": 2}]
VECTORS = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
NO_SOURCE = "Upstream defines no source of it"
JOBS = Path(__file__).resolve().parents[3] / "jobs"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.set_num_threads(1)
    return models(tmp_path_factory.mktemp("adaln"), adaln=True)


@pytest.fixture(scope="module")
def model(pair):
    return scldm.load(pair["vae"], flow=pair["flow"])


def job(folder, pair, **settings):
    facts = generate(folder, {}, model=pair, cells=ROWS, seed=7, **settings)
    write_manifest(Manifest("generate", "v", str(folder), {}, {}, facts, 1.0, 1.0))
    return scldm.open_cells(folder)[:]


def test_a_notebook_decodes_each_row_under_its_vector(model):
    cells = model.generate(ROWS, seed=7, decoder_condition=VECTORS)
    other = model.generate(ROWS, seed=7, decoder_condition=VECTORS[::-1])
    np.testing.assert_array_equal(cells.obsm["X_scldm"], other.obsm["X_scldm"])  # the flow knows nothing of them
    assert (cells.X != other.X).nnz > 0
    alike = model.generate(ROWS, seed=7, decoder_condition=VECTORS[0])
    np.testing.assert_array_equal(alike.X[:3].toarray(), cells.X[:3].toarray())
    assert (alike.X[3:] != cells.X[3:]).nnz > 0
    assert cells.uns["scldm"]["decoder_condition"] != other.uns["scldm"]["decoder_condition"]


def test_a_job_makes_the_cells_of_the_notebook(model, pair, tmp_path):
    np.save(tmp_path / "vectors.npy", VECTORS)
    made = job(tmp_path / "out", pair, decoder_condition=str(tmp_path / "vectors.npy"), shard_size=2)
    ours = model.generate(ROWS, seed=7, decoder_condition=VECTORS)
    np.testing.assert_array_equal(made.X.toarray(), ours.X.toarray())
    assert made.uns["scldm"]["decoder_condition"] == ours.uns["scldm"]["decoder_condition"]


def test_a_reconstruction_is_decoded_under_the_vector_of_each_cell(model):
    cells = real_cells()
    vectors = np.random.default_rng(1).standard_normal((cells.n_obs, 8)).astype(np.float32)
    made = model.reconstruct(cells, mean=True, decoder_condition=vectors)
    z = torch.from_numpy(made.obsm["X_scldm"]).unflatten(1, model.latent_shape)
    size = torch.from_numpy(made.obs["library_size"].to_numpy())
    with torch.inference_mode():
        expected = model.vae.vae.decode(z, size, condition=torch.from_numpy(vectors)).mu
    np.testing.assert_allclose(made.layers["mean"], expected.numpy(), rtol=1e-4)


def test_encoding_needs_no_vectors(model, pair, tmp_path):
    settings = {"source": write_soma(tmp_path / "soma"), "model": {"vae": pair["vae"]}}
    embedded = scldm.open_cells(run_stage("embed", tmp_path / "out", settings))[:]
    latents = model.encode(real_cells()).obsm["X_scldm"]
    np.testing.assert_allclose(embedded.obsm["X_scldm"], latents, atol=1e-6)


def test_without_vectors_the_reason_is_said_and_nothing_is_written(model, pair, tmp_path):
    with pytest.raises(InputError, match=f"{NO_SOURCE}.*decoder_condition, .8,. for all"):
        model.generate(ROWS)
    with pytest.raises(InputError, match=NO_SOURCE):
        model.reconstruct(real_cells())
    with pytest.raises(InputError, match="log_likelihood takes none"):
        model.log_likelihood(real_cells())
    with pytest.raises(InputError, match=f"generate: .*{NO_SOURCE}"):
        job(tmp_path / "out", pair)
    assert list((tmp_path / "out" / "cells").iterdir()) == []
    settings = {"source": write_soma(tmp_path / "soma"), "model": {"vae": pair["vae"]}}
    with pytest.raises(InputError, match=f"model.vae: .*{NO_SOURCE}.*this job takes none"):
        run_stage("reconstruct", tmp_path / "rebuilt", settings)


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (VECTORS[:, :5], r"has shape \(2, 5\); it must be \(8,\) for all, or \(2, 8\), one for each row"),
        (np.full((2, 8), np.nan), "must be finite; 16 are not"),
        ([["a"]], "must be numbers"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(model, vectors, words):
    with pytest.raises(InputError, match=words):
        model.generate(ROWS, decoder_condition=vectors)


def test_a_file_that_holds_no_numbers_is_refused(pair, tmp_path):
    (tmp_path / "table.csv").write_text("1,2\n")
    with pytest.raises(InputError, match=r"table.csv is no .npy file of numbers"):
        job(tmp_path / "out", pair, decoder_condition=str(tmp_path / "table.csv"))


def test_a_decoder_without_conditions_takes_none(tmp_path):
    plain = models(tmp_path)
    with pytest.raises(InputError, match="the VAE's decoder takes none"):
        scldm.load(plain["vae"], flow=plain["flow"]).generate(ROWS, decoder_condition=VECTORS)
    np.save(tmp_path / "vectors.npy", VECTORS)
    given = load_job(JOBS / "demo.yaml", [f"generate.decoder_condition={tmp_path / 'vectors.npy'}"])
    with pytest.raises(InputError, match="the VAE's decoder takes none"):
        check_settings(given)
