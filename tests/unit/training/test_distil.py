"""The distil stage without Ray: trajectories, the training on them, what interrupts it, the model that it leaves."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.models.small_models import CELL_TYPES, DONORS, library_sizes, vocabulary
from helpers.stages.distil_case import (
    STEPS,
    config_of,
    context_of,
    distil,
    local_pool,
    metrics,
    worker_spec,
)
from helpers.stages.generation_case import generate, hashes, write_inputs
from helpers.training.ranks import KILLED, run
from safetensors.torch import load_file

import scldm
from pipeline.data.loading.blocks import IpcBlocks
from pipeline.stages.training.distil import folder_problems, solve
from pipeline.stages.training.trajectories import (
    TrajectorySolver,
    combinations,
    drawn_conditions,
    parts_of,
)
from scldm.checkpoints.native import folder_digest, load_flow
from scldm.data.library_size import LibrarySizes, LogNormal
from scldm.errors import CheckpointError, InputError
from scldm.flow.config import Distilled, SamplerConfig
from scldm.flow.distilled import sample_distilled
from scldm.flow.sampler import sample_latents
from scldm.generation.counter_random import normals

W = 2.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory):
    """A distillation that nobody interrupted, with guidance."""
    folder = tmp_path_factory.mktemp("done")
    assert distil(folder, inputs, guidance=W) == [0], (folder / "log").read_text()[-3000:]
    return folder


def solved(folder, inputs, **settings) -> pa.Table:
    config, context = config_of(**settings), context_of(folder, inputs)
    records = solve(config, context, inputs["train_flow"].path("model"), local_pool)
    source = IpcBlocks(str(folder / "trajectories"), tuple((r["file"], r["n_cells"]) for r in records))
    return source.read(source.ids)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


# ---- trajectories ----------------------------------------------------------------------------------------------------
def test_a_trajectory_begins_at_its_noise_and_ends_where_the_guided_teacher_ends(inputs, tmp_path):
    table = solved(tmp_path, inputs, guidance=W)
    assert len(table) == 48 + 16
    states = table["latent"].combine_chunks().flatten().to_numpy().reshape(64, 3, 3, 4)
    ids = table["soma_joinid"].to_numpy()
    np.testing.assert_array_equal(states[:, 0].reshape(64, -1), normals(ids, 12, seed=0, stream=14))
    flow = load_flow(inputs["train_flow"].path("model"))
    conditions = {x: torch.from_numpy(table[f"label:{x}"].to_numpy().astype(np.int64)) for x in ("cell_type", "donor")}
    scale = {"*": torch.full((64,), W)}
    ends = sample_latents(
        flow.dit, torch.from_numpy(states[:, 0].copy()), conditions, SamplerConfig(steps=4), flow.path, scale=scale
    )
    torch.testing.assert_close(torch.from_numpy(states[:, -1].copy()), ends, rtol=1e-4, atol=1e-4)


def test_trajectories_do_not_depend_on_how_they_are_cut_into_shards(inputs, tmp_path):
    one, two = solved(tmp_path / "a", inputs), solved(tmp_path / "b", inputs, shard_size=7)
    assert one.equals(two)


def test_shards_that_were_committed_are_not_solved_again(inputs, tmp_path):
    whole = solved(tmp_path, inputs)
    calls = []

    def counting(todo, spec, context):
        calls.append(list(todo))
        return local_pool(todo, spec, context)

    (tmp_path / "trajectories" / "train-00001.arrow").unlink()
    solve(config_of(), context_of(tmp_path, inputs), inputs["train_flow"].path("model"), counting)
    assert calls == [[1]]
    assert solved(tmp_path, inputs).equals(whole)


def test_parts_cover_all_trajectories_and_keep_held_out_ones_apart():
    parts = parts_of(config_of())
    assert [(p.split, p.start, p.stop) for p in parts] == [
        ("train", 0, 20), ("train", 20, 40), ("train", 40, 48), ("validation", 48, 64),
    ]  # fmt: skip


def test_labels_are_drawn_from_the_combinations_of_the_training_cells_rare_ones_more_often_than_they_are():
    names = vocabulary(CELL_TYPES)
    sizes = LibrarySizes(
        {"all": LogNormal(9, 1, 1010), "cell_type=T": LogNormal(9, 1, 1000), "cell_type=NK": LogNormal(9, 1, 10)}
    )
    assert combinations(names, sizes)[0] == [{"cell_type": "T"}, {"cell_type": "NK"}], "no cell is a B"
    conditions, rows = drawn_conditions(names, sizes, 4000, label_dropout=0.2, seed=0)
    found = Counter(conditions[i]["cell_type"] for i in rows.tolist())
    assert found[None] == pytest.approx(800, abs=80), "as many as train without labels"
    assert found["NK"] / found["T"] == pytest.approx(0.1, abs=0.02), "as the root of 10 / 1000"


def test_single_labels_are_dropped_too_if_there_are_several():
    names = vocabulary(CELL_TYPES, DONORS)
    conditions, rows = drawn_conditions(names, library_sizes(CELL_TYPES, DONORS), 2000, label_dropout=0.2, seed=0)
    counts = Counter(tuple(v is None for v in conditions[i].values()) for i in rows.tolist())
    assert set(counts) == {(False, False), (True, False), (False, True), (True, True)}


def test_the_drawn_labels_are_a_function_of_the_seed():
    names, sizes = vocabulary(CELL_TYPES), library_sizes(CELL_TYPES)
    one, two, three = (drawn_conditions(names, sizes, 200, label_dropout=0.1, seed=s)[1] for s in (0, 0, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)


def test_a_flow_that_is_not_finite_names_its_trajectories(inputs, tmp_path):
    config, context = config_of(), context_of(tmp_path, inputs)
    seen = []

    def broken(todo, spec, context):
        actor = TrajectorySolver(spec)
        with torch.no_grad():
            actor.flow.dit.head.linear.weight.fill_(float("nan"))
        seen.append(actor)
        yield actor.make(todo[0])

    with pytest.raises(FloatingPointError, match="trajectories 0 to 31 are not finite"):
        solve(config, context, inputs["train_flow"].path("model"), broken)


# ---- training --------------------------------------------------------------------------------------------------------
def test_the_model_says_that_it_is_distilled_how_and_from_what(done, inputs):
    flow = load_flow(done / "model")
    teacher = folder_digest(inputs["train_flow"].path("model"))
    assert flow.distilled == Distilled(evaluations=2, guidance=W, teacher=teacher)
    assert "a cell takes 2 evaluations of the network, with guidance 2" in (done / "model" / "README.md").read_text()
    assert (done / "model" / "raw.safetensors").is_file()


def test_training_starts_from_the_teacher_and_validates_each_jump(done, inputs):
    rows = [r for r in metrics(done) if "val/loss" in r]
    assert [r["step"] for r in rows] == [3, STEPS]
    for row in rows:
        assert row["val/loss"] == pytest.approx((row["val/jump_1"] + row["val/jump_2"]) / 2)
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    before, after = load_file(inputs["train_flow"].path("model") / "model.safetensors"), weights(done)
    assert before.keys() == after.keys()
    assert all((before[k] - after[k]).abs().max() < 0.1 for k in before), "a few steps from where it began"


def test_workers_and_micro_batches_change_nothing_but_rounding(done, inputs, tmp_path):
    feed = {"batch_size": 16, "micro_batch_size": 4, "lanes": 2}
    train = {**config_of().train.model_dump(mode="json"), "feed": feed}
    assert distil(tmp_path, inputs, 2, guidance=W, train=train) == [0, 0], (tmp_path / "log").read_text()[-3000:]
    one, two = ([r["val/loss"] for r in metrics(x) if "val/loss" in r] for x in (done, tmp_path))
    assert one == pytest.approx(two, rel=1e-4)
    x0, ids = torch.randn(8, 3, 4), {"cell_type": torch.arange(8) % 4, "donor": torch.arange(8) % 3}
    cells = [
        sample_distilled(f.dit, x0, ids, f.distilled, f.path)
        for f in map(load_flow, (done / "model", tmp_path / "model"))
    ]
    torch.testing.assert_close(*cells, rtol=1e-3, atol=1e-2)


def test_a_run_that_was_killed_goes_on_and_ends_at_the_same_weights(done, inputs, tmp_path):
    spec = worker_spec(tmp_path, inputs, guidance=W)
    assert run(spec, 1, "training.before_step:step=4:rank=0:kill") == [KILLED]
    assert run(spec, 1) == [0], (tmp_path / "log").read_text()[-3000:]
    one, two = weights(done), weights(tmp_path)
    assert all(torch.equal(one[k], two[k]) for k in one)


# ---- cells -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pipeline(done, inputs):
    """Manifests as generate reads them, with the distilled flow."""
    made = replace(inputs["train_flow"], stage="distil", folder=str(done))
    return {k: v for k, v in inputs.items() if k != "train_flow"} | {"distil": made}


TABLE = [{"cell_type": "T", "donor": "d1", "n_cells": 20}, {"cell_type": "NK", "n_cells": 10}, {"n_cells": 5}]


def test_a_job_generates_the_same_cells_for_any_size_of_shards_and_batches(pipeline, tmp_path):
    ask = {"flow": "distil", "cells": TABLE, "sampler": {"guidance": W}}
    facts = generate(tmp_path / "a", pipeline, **ask, shard_size=35)
    generate(tmp_path / "b", pipeline, **ask, shard_size=35, batch_size=100)
    assert facts["n_cells"] == 35
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_notebook_makes_the_cells_of_the_job(pipeline, inputs, done, tmp_path):
    import anndata

    facts = generate(tmp_path, pipeline, flow="distil", cells=TABLE, sampler={"guidance": W}, shard_size=35)
    job = anndata.read_h5ad(tmp_path / facts["shards"][0]["file"])
    model = scldm.load(inputs["train_vae"].path("model"), flow=done / "model")
    cells = model.generate(TABLE, guidance=W)
    assert (cells.X != job.X).nnz == 0
    np.testing.assert_array_equal(cells.obsm["X_scldm"], job.obsm["X_scldm"])
    assert job.obs["guidance_scale"].eq(W).all()
    assert json.loads(job.uns["scldm"]["distilled"])["evaluations"] == 2


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"sampler": {}}, r"guidance \(1\): this flow was distilled with guidance 2"),
        ({"sampler": {"guidance": W, "solver": "rk4"}}, r"generate\.sampler\.solver \(rk4"),
        ({"sampler": {"guidance": W}, "start": "control"}, "trained from noise only"),
        ({"sampler": {"guidance": W}, "cells": [{"cell_type": "T", "n_cells": 5, "guidance": 3}]}, "guidance of row 1"),
    ],
)
def test_a_job_that_asks_for_what_it_cannot_do_is_refused_before_any_cell(pipeline, tmp_path, ask, message):
    with pytest.raises(InputError, match=message):
        generate(tmp_path, pipeline, **{"flow": "distil", "cells": TABLE, **ask})
    assert not list((tmp_path / "cells").glob("*.h5ad"))


def test_guidance_of_a_label_that_a_row_does_not_have_means_nothing(pipeline, tmp_path):
    table = [{"n_cells": 3, "guidance": 1.0}, {"cell_type": "T", "n_cells": 3, "guidance": W}]
    assert generate(tmp_path, pipeline, flow="distil", cells=table, sampler={"guidance": W})["n_cells"] == 6


def test_likelihoods_and_perturbations_name_the_flow_to_take(inputs, done):
    import anndata

    model = scldm.load(inputs["train_vae"].path("model"), flow=done / "model")
    adata = anndata.AnnData(np.ones((4, 6), dtype=np.float32))
    adata.var_names = [f"g{i}" for i in range(6)]
    adata.obs["cell_type"], adata.obs["donor"] = "T", "d1"
    with pytest.raises(InputError, match="needs the velocity field of a flow"):
        model.log_likelihood(adata, flow=True)
    for start in ("latents", "noise"):
        with pytest.raises(InputError, match="needs the velocity field of a flow"):
            model.perturb(adata, {"cell_type": "NK"}, start=start)


def test_a_distilled_flow_is_not_distilled_again_nor_trained_on(inputs, done, tmp_path):
    from helpers.models.small_models import write_flow

    from scldm.checkpoints.start_from import start_flow

    [problem] = folder_problems(config_of(), done / "model")
    assert "this one was distilled" in problem
    other = load_flow(write_flow(tmp_path / "flow", CELL_TYPES, DONORS))
    with pytest.raises(CheckpointError, match="start_from needs the velocity field"):
        start_flow(other.dit, other.vocabulary, load_flow(done / "model"))


def test_a_finished_stage_loads_by_its_folder_with_the_vae_that_belongs_to_it(inputs, done, tmp_path):
    """As the manifests of a pipeline say; and with its own VAE, or by both names, if the job named the flow."""
    root = tmp_path / "runs" / "mine"
    for stage, source in (("train_vae", inputs["train_vae"].folder), ("distil", done)):
        shutil.copytree(Path(source) / "model", root / stage / "v1" / "model")
    (root / "train_vae" / "v1" / "manifest.json").write_text(
        json.dumps({"stage": "train_vae", "facts": {"model": "model"}, "inputs": {}, "finished_at": 1})
    )
    about = {"stage": "distil", "facts": {"model": "model"}, "inputs": {"train_vae": "v1"}, "finished_at": 2}
    manifest = root / "distil" / "v1" / "manifest.json"
    manifest.write_text(json.dumps(about))
    for name in (root / "distil" / "v1", root / "distil", root / "distil" / "v1" / "model", root):
        assert scldm.load(name).flow.distilled.evaluations == 2
    manifest.write_text(json.dumps(about | {"inputs": {}}))
    with pytest.raises(CheckpointError, match=r"name both: scldm\.load\(vae_folder, flow='(.*)'\)") as error:
        scldm.load(root / "distil" / "v1")
    flow = re.search(r"flow='(.*)'", str(error.value))[1]
    assert scldm.load(root / "train_vae" / "v1" / "model", flow=flow).flow.distilled is not None
    shutil.copytree(root / "train_vae" / "v1" / "model", root / "distil" / "v1" / "vae")
    facts = about["facts"] | {"vae": {"ema": "vae", "raw": "vae"}}
    manifest.write_text(json.dumps(about | {"inputs": {}, "facts": facts}))
    assert scldm.load(root / "distil" / "v1").folders.vae == root / "distil" / "v1" / "vae"
