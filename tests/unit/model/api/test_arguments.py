"""Arguments of the notebook's functions are checked before anything is computed, and all problems come together."""

from __future__ import annotations

import json
import re

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.stages.cell_stages import models, real_cells

import scldm
from scldm.api.parts import check_fits
from scldm.errors import InputError
from scldm.generation.cell_maker import CellMaker

T = {"cell_type": "T"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models(root)
    return root


@pytest.fixture(scope="module")
def model(folder):
    return scldm.load(folder)


@pytest.fixture
def nothing_is_computed(monkeypatch, model):
    def computes(*args, **kwargs):
        raise AssertionError("something was computed before all arguments were checked")

    monkeypatch.setattr(CellMaker, "cells", computes)
    monkeypatch.setattr(model.vae.vae, "encode", computes)
    monkeypatch.setattr("scldm.api.methods.real_cells.align", computes)
    monkeypatch.setattr("scldm.api.methods.analyses.align", computes)


@pytest.mark.parametrize(
    ("numpy_s", "plain"),
    [
        ({"seed": np.int64(3), "n": np.int32(4)}, {"seed": 3, "n": 4}),
        ({"seed": np.uint8(3), "n": np.float64(4)}, {"seed": 3, "n": 4}),
        ({"n": 4, "guidance": np.float32(2)}, {"n": 4, "guidance": 2.0}),
        (
            {"n": 4, "guidance": {"cell_type": np.float32(2), "donor": np.int64(2)}},
            {"n": 4, "guidance": {"cell_type": 2.0, "donor": 2.0}},
        ),
        ({"n": 4, "library_size": np.float32(50)}, {"n": 4, "library_size": 50}),
        ({"n": 4, "library_size": np.int64(50)}, {"n": 4, "library_size": 50.0}),
        ({"n": 4, "sampler": {"steps": np.int64(3)}}, {"n": 4, "sampler": {"steps": 3}}),
        ({"n": 4, "genes": np.array(["g1", "g2"])}, {"n": 4, "genes": ["g1", "g2"]}),
    ],
    ids=str,
)
def test_numpy_scalars_are_numbers(model, numpy_s, plain):
    a, b = model.generate(T, **numpy_s), model.generate(T, **plain)
    np.testing.assert_array_equal(a.X.toarray(), b.X.toarray())
    assert a.uns["scldm"]["seed"] == b.uns["scldm"]["seed"]
    assert type(a.uns["scldm"]["seed"]) is int
    assert float(a.uns["scldm"]["library_size"] == b.uns["scldm"]["library_size"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n": 2, "library_size": "median"}, "library_size must be 'statistics' or a number above 0; got 'median'"),
        ({"n": 2, "library_size": -5}, "library_size must be 'statistics' or a number above 0; got -5"),
        ({"n": 2, "library_size": 0}, "library_size must be"),
        ({"n": 2, "library_size": float("nan")}, "library_size must be"),
        ({"n": 2, "library_size": None}, "library_size must be"),
        ({"n": 2, "library_size": True}, "library_size must be"),
        ({"n": -2}, "n must be a whole number >= 0; got -2"),
        ({"n": 2.5}, "n must be a whole number >= 0; got 2.5"),
        ({"n": "2"}, "n must be a whole number >= 0; got '2'"),
        ({"n": 2, "seed": -1}, "seed must be a whole number in 0 .. 18446744073709551615; got -1"),
        ({"n": 2, "seed": "0"}, "seed must be a whole number"),
        ({"n": 2, "seed": 1.5}, "seed must be a whole number"),
        ({"n": 2, "seed": None}, "seed must be a whole number"),
        ({"n": 2, "seed": 2**64}, "seed must be a whole number"),
        ({"n": 2, "guidance": "2"}, "guidance must be a dictionary of label and scale, or a number; got '2'"),
        ({"n": 2, "guidance": float("inf")}, "guidance must be"),
        ({"n": 2, "guidance": {"cell_type": "x", "donor": 1}}, "guidance['cell_type'] must be a number; got 'x'"),
        ({"n": 2, "sampler": {"step": 3}}, "sampler.step: Extra inputs are not permitted; got 3 (did you mean 'steps'"),
        ({"n": 2, "sampler": {"steps": 0}}, "sampler.steps: Input should be greater than 0; got 0"),
        ({"n": 2, "sampler": "rk4"}, "sampler must be a dictionary of settings or a SamplerConfig; got 'rk4'"),
        ({"n": 2, "genes": "g1"}, "genes must be a list of gene ids or names; got 'g1'"),
        ({"n": 2, "genes": [1, 2]}, "genes must be a list of gene ids or names"),
        ({"n": 2, "conditions": "T"}, "conditions must be a dictionary {label: class}"),
        ({"n": 2, "conditions": ["T"]}, "conditions must be a dictionary {label: class}"),
        ({"n": 2, "conditions": 5}, "for cells without labels write generate(n=5)"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("nothing_is_computed")
def test_an_argument_that_cannot_be_used_is_named(model, arguments, said):
    with pytest.raises(InputError) as error:
        model.generate(**{"conditions": T, **arguments})
    assert said in str(error.value)


@pytest.mark.usefixtures("nothing_is_computed")
def test_all_problems_of_a_call_are_reported_together(model):
    with pytest.raises(InputError) as error:
        model.generate(
            {"cell_type": "X"}, n=-1, seed="a", library_size="mean", guidance={"cell_typ": 1.0}, genes=["nope"],
            sampler={"steps": -1, "solver": "rk5"},
        )  # fmt: skip
    words = (
        "n must",
        "seed must",
        "library_size must",
        "'cell_typ'",
        "'nope'",
        "sampler.steps",
        "sampler.solver",
        "'X'",
    )
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("encode", {"max_missing": 2, "match": "name"}, ["max_missing must be", "match must be 'id'"]),
        ("encode", {"layer": 1, "genes": ["a"]}, ["layer must be a text or None", "genes must be a text or None"]),
        ("reconstruct", {"seed": -1, "mean": "yes"}, ["seed must be", "mean must be True or False; got 'yes'"]),
        ("log_likelihood", {"probes": 0, "flow": 1}, ["probes must be", "flow must be True or False"]),
        ("log_likelihood", {"probes": -5, "seed": 0.5}, ["probes must be a whole number >= 1; got -5", "seed must be"]),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("nothing_is_computed")
def test_methods_on_real_cells_check_theirs_first(model, method, arguments, words):
    with pytest.raises(InputError) as error:
        getattr(model, method)(real_cells(), **arguments)
    assert [word for word in words if word not in str(error.value)] == []


def test_cells_are_an_anndata_or_the_path_of_one(model, tmp_path):
    with pytest.raises(InputError, match=r"adata must be an AnnData or the path of an h5ad file; got int"):
        model.encode(5)
    with pytest.raises(InputError, match=r"adata: there is no file .*nothing\.h5ad"):
        model.encode(tmp_path / "nothing.h5ad")
    real_cells().write_h5ad(tmp_path / "cells.h5ad")
    from_path = model.encode(str(tmp_path / "cells.h5ad"))
    np.testing.assert_array_equal(from_path.obsm["X_scldm"], model.encode(real_cells()).obsm["X_scldm"])
    backed = model.encode(anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r"))
    np.testing.assert_array_equal(from_path.obsm["X_scldm"], backed.obsm["X_scldm"])


def test_the_layer_raw_is_raw(model):
    plain, normalised = real_cells(), real_cells()
    normalised.raw = plain
    normalised.X = normalised.X * 0.5
    found = model.encode(normalised, layer="raw").obsm["X_scldm"]
    np.testing.assert_array_equal(found, model.encode(plain).obsm["X_scldm"])
    with pytest.raises(InputError, match="layer is 'raw', and there is no raw"):
        model.encode(plain, layer="raw")


def test_a_device_is_found_where_it_is_left_to_the_machine(folder):
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert scldm.load(folder, device="auto").device.type == expected


def test_more_cells_than_memory_holds_are_refused_with_a_word_about_batch_jobs(model, nothing_is_computed):
    for given in ({"n": 10**12}, {"conditions": [{"cell_type": "T", "n_cells": 10**12}] * 2}):
        with pytest.raises(InputError, match=r"000 cells take at least .* GiB.*: scldm run jobs/generate\.yaml"):
            model.generate(**given)


def test_the_number_of_cells_that_is_offered_instead_fits():
    with pytest.raises(InputError) as error:
        check_fits(10**6, n_latent_numbers=100, memory=10**8)
    fewer = int(re.search(r"ask for ([\d,]+) cells", str(error.value))[1].replace(",", ""))
    assert fewer == 50_000
    check_fits(fewer, n_latent_numbers=100, memory=10**8)


@pytest.mark.parametrize("column", ["n_cells", "library_size", "guidance"])
def test_a_bool_in_a_table_is_no_number(model, nothing_is_computed, column):
    table = [{"cell_type": "T", "n_cells": 2, column: True}, {"cell_type": "B", "n_cells": 2, column: 2}]
    for rows in (table, pd.DataFrame(table), pd.DataFrame(table[:1])):
        with pytest.raises(InputError, match=rf"{column} must be .*numbers.* the first in row 1 \((np\.)?True"):
            model.generate(rows)


def test_numpy_seeds_draw_what_their_numbers_draw(model):
    a, b = model.reconstruct(real_cells(), seed=np.int64(5)), model.reconstruct(real_cells(), seed=5)
    assert (a.X != b.X).nnz == 0
    probes = {"flow": True, "probes": np.int64(2), "seed": np.uint32(4)}
    same = {"flow": True, "probes": 2, "seed": 4}
    assert model.log_likelihood(real_cells(), **probes).equals(model.log_likelihood(real_cells(), **same))


def test_loading_checks_its_arguments_together(folder):
    with pytest.raises(InputError) as error:
        scldm.load(folder, weights="emma", device="gpu7")
    assert "weights must be 'ema' or 'raw'; got 'emma'" in str(error.value)
    assert "device: 'gpu7' cannot be used here" in str(error.value)
    with pytest.raises(InputError, match="folder must be a path; got None"):
        scldm.load(None)


def test_weights_of_a_flow_are_those_that_were_loaded(model, folder):
    with pytest.raises(InputError, match=r"sampler\.weights is 'raw', and the model was loaded with 'ema'"):
        model.generate(T, n=1, sampler={"weights": "raw"})
    raw = scldm.load(folder, weights="raw").generate(T, n=1, sampler={"weights": "raw"})
    assert json.loads(raw.uns["scldm"]["sampler"])["weights"] == "raw"


def test_scores_check_their_arguments_together():
    with pytest.raises(InputError) as error:
        scldm.score("made.h5ad", real=real_cells(), max_cells=-5, n_pcs=0, seed="a", label=["cell_type"])
    words = (
        "generated: there is no file made.h5ad",
        "max_cells must be",
        "n_pcs must be",
        "seed must be",
        "label must be a text",
    )
    assert [word for word in words if word not in str(error.value)] == []
    with pytest.raises(InputError, match="real has no layer 'raw'"):
        scldm.score(real_cells(), real=real_cells(), layer="raw")
