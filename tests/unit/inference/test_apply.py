"""Jobs on real cells: what comes out is the input's, cell for cell, however it was cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models.small_models import CELL_TYPES
from helpers.stages.cell_stages import here, real_cells, run_stage, write_cells
from helpers.stages.real_cell_jobs import ALL, cells_and_models, equal, made

import scldm
from scldm.checkpoints.native import load_flow, load_vae
from scldm.data.batch import CellBatch
from scldm.flow.config import SamplerConfig
from scldm.generation.real_cells import to_noise, under_condition


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return cells_and_models(tmp_path_factory.mktemp("real"))


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


def test_a_record_of_the_input_that_was_not_written_to_its_end_starts_the_job_anew(place, tmp_path):
    whole = made(place, tmp_path, "embed", shard_size=40)
    (tmp_path / "out" / "input.json").write_text('{"dig')
    equal(made(place, tmp_path, "embed", shard_size=40), whole)


@pytest.mark.row("G8")
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
