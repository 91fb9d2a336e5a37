"""Control cells that a flow carries to a treatment, and counts that follow the change of their means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models.small_models import CELL_TYPES, DONORS, write_flow, write_vae
from helpers.stages.cell_stages import real_cells, run_stage
from helpers.stages.real_cell_jobs import cells_and_models, equal, made

from pipeline.config.apply import PerturbConfig
from scldm.checkpoints.native import load_flow, load_vae
from scldm.data.batch import CellBatch
from scldm.errors import InputError
from scldm.flow.config import ControlStart, SamplerConfig
from scldm.flow.sampler import sample_latents
from scldm.flow.transport import FromControls
from scldm.generation.draws.change import Change
from scldm.generation.draws.changed_counts import change_counts
from scldm.generation.perturbed import ADDED, KEPT

START = ControlStart(label="donor", control="d1", share=0.5)
CARRIED = {"to": {"donor": "d_2"}, "start": "control", "cells": {"where": {"donor": "d1"}}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root, source, folders = cells_and_models(tmp_path_factory.mktemp("real"))
    flow = write_flow(root / "transport", CELL_TYPES, DONORS, start=START)
    alone = write_flow(root / "alone", CELL_TYPES, DONORS, start=START.model_copy(update={"share": 1.0}))
    return root, source, {**folders, "flow": str(flow), "alone": str(alone), "noise": folders["flow"]}


def job(place, tmp_path, flow="flow", **more):
    root, source, folders = place
    return made((root, source, {"vae": folders["vae"], "flow": folders[flow]}), tmp_path, "perturb", **more)


def expected(place, donor="d1"):
    """Encode the cells and carry them, without tiles; their own counts, means and new means."""
    vae, flow = load_vae(place[0] / "vae"), load_flow(place[0] / "transport")
    adata = real_cells()
    kept = (adata.obs["donor"] == donor).to_numpy()
    columns = [list(adata.var_names).index(g) for g in vae.vocabulary.feature_ids]
    counts = adata.X[kept][:, columns].tocsr()
    counts.sort_indices()
    cells = CellBatch.from_csr(counts)
    target = {
        "cell_type": torch.from_numpy(CELL_TYPES.encode(adata.obs["cell_type"][kept])),
        "donor": torch.from_numpy(DONORS.encode(["d_2"] * len(kept))[kept]),
    }
    z = vae.vae.encode(cells)
    moved = sample_latents(FromControls(flow.dit), z, target, SamplerConfig(solver="midpoint", steps=4), flow.path)
    own, new = (vae.vae.decode(x, cells.library_size) for x in (z, moved))
    arrays = own.mu, new.mu, own.theta.reshape(-1, counts.shape[1])
    return moved, Change(counts.toarray(), *(x.detach().numpy() for x in arrays)), np.flatnonzero(kept)


def test_control_cells_are_carried_from_their_own_latents(place, tmp_path):
    out = job(place, tmp_path, **CARRIED)
    moved, *_ = expected(place)
    np.testing.assert_allclose(out.obsm["X_scldm"], moved.flatten(1).detach(), rtol=1e-4, atol=1e-5)
    assert set(out.obs["donor"]) == {"d1"}, "the column of the input stays"
    assert set(out.obs["to_donor"]) == {"d_2"}


def test_changed_counts_are_the_cell_s_own_after_the_change_of_the_means(place, tmp_path):
    out = job(place, tmp_path, counts="changed", **CARRIED)
    _, change, ids = expected(place)
    plain = change_counts(change, ids, seed=0, kept_stream=KEPT, added_stream=ADDED)
    assert (out.X.toarray() != plain.toarray()).mean() < 0.01, "but where the batch rounds otherwise"
    np.testing.assert_array_equal(out.obs["total_counts"], np.asarray(out.X.sum(1)).ravel())
    assert (out.obs["total_counts"] != out.obs["library_size"]).any(), "the library size follows"


@pytest.mark.parametrize("start", ["control", "latents"])
def test_what_is_read_at_once_changes_no_count(place, tmp_path, start):
    settings = {**CARRIED, "start": start, "counts": "changed"}
    small = job(place, tmp_path, name="small", batch_size=7, **settings)
    equal(small, job(place, tmp_path, name="large", batch_size=1000, **settings))


@pytest.mark.parametrize(
    ("flow", "settings"),
    [
        ("noise", {**CARRIED, "start": "latents"}), ("alone", CARRIED), ("flow", CARRIED),
        ("flow", {**CARRIED, "cells": {}, "start": "latents"}),
        ("flow", {**CARRIED, "to": {"cell_type": "NK"}, "start": "latents"}),
    ],
)  # fmt: skip
def test_what_a_refusal_proposes_works(place, tmp_path, flow, settings):
    assert job(place, tmp_path, flow, **settings).n_obs > 0


def test_latents_have_no_likelihood_under_a_flow_that_was_trained_from_controls_alone(place, tmp_path):
    root, source, folders = place
    pair = (root, source, {"vae": folders["vae"], "flow": folders["alone"]})
    with pytest.raises(InputError, match="leave flow out, or train with a share below 1"):
        made(pair, tmp_path, "log_likelihood")
    source, vae = place[1], {"vae": folders["vae"]}
    assert run_stage("log_likelihood", tmp_path / "plain", {"source": source, "model": vae})
    made((root, source, {"vae": folders["vae"], "flow": folders["flow"]}), tmp_path, "log_likelihood", name="half")


@pytest.mark.parametrize(
    ("flow", "settings", "words"),
    [
        ("noise", CARRIED, "set start=latents, or train a flow with train_flow.start="),
        ("alone", {**CARRIED, "start": "latents"}, "perturb job with start=control"),
        ("alone", {**CARRIED, "start": "noise"}, "start .noise. needs a flow that was trained from noise"),
        ("flow", {**CARRIED, "cells": {}},
         r"of 70 cells have another: 'd_2' \(\d+ cells, first: cell-\d+\).*where={donor: d1}"),
        ("flow", {**CARRIED, "to": {"cell_type": "NK"}}, "`to` names cell_type: give it donor alone"),
        ("flow", {**CARRIED, "to": {"donor": "d_2", "cell_type": "NK"}}, "`to` names cell_type: give it donor alone"),
    ],
)  # fmt: skip
def test_a_start_that_the_cells_or_the_flow_do_not_have_is_refused_before_anything_is_made(
    place, tmp_path, flow, settings, words
):
    with pytest.raises(InputError, match=words):
        job(place, tmp_path, flow, **settings)
    assert not list((tmp_path / "out").glob("cells/part-*"))


def test_new_noise_has_no_counts_to_change():
    source = {"type": "h5ad", "path": "x.h5ad"}
    with pytest.raises(ValueError, match="set counts=drawn or start=latents"):
        PerturbConfig.model_validate({"source": source, "to": {"a": "b"}, "start": "noise", "counts": "changed"})
    for fix in ({"start": "noise", "counts": "drawn"}, {"start": "latents", "counts": "changed"}):
        PerturbConfig.model_validate({"source": source, "to": {"a": "b"}, **fix})
    assert "counts" not in PerturbConfig.model_validate({"source": source, "to": {"a": "b"}}).model_dump()


def test_changed_counts_of_a_gaussian_head_are_refused(tmp_path):
    root, source, folders = cells_and_models(tmp_path)
    folders["vae"] = str(write_vae(root / "gaussian", CELL_TYPES, DONORS, head="gaussian", genes_seq_len=None))
    with pytest.raises(InputError, match=r"gaussian head.*set counts=drawn"):
        made((root, source, folders), tmp_path, "perturb", counts="changed")
    made((root, source, folders), tmp_path, "perturb", name="drawn", counts="drawn")
