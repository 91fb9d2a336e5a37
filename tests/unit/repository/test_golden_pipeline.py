"""Row C12: the output of a pipeline that an earlier version ran is an output of this version."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training.ranks import train
from typer.testing import CliRunner

import scldm
from pipeline.cli.app import app
from pipeline.core.manifest import Manifest, newest_manifest
from pipeline.training.checkpoints.manifest import newest
from scldm.api.origin import recorded_scores
from scldm.checkpoints.native import load_vae
from scldm.checkpoints.start_from import start_flow, start_vae
from scldm.data.batch import CellBatch
from scldm.errors import CheckpointError
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
VERSIONS = sorted(p.parents[1] for p in GOLDEN.glob("*/pipeline/expected.json"))
STAGES = ["ingest", "train_vae", "encode", "train_flow", "generate", "evaluate"]
pytestmark = pytest.mark.row("C12")


@pytest.fixture(params=VERSIONS, ids=lambda p: p.name)
def golden(request):
    return request.param / "pipeline"


@pytest.fixture
def runs(golden, tmp_path):
    """The output folder at another place, where it may be written to."""
    return Path(shutil.copytree(golden / "runs", tmp_path / "runs"))


def scldm_command(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def manifest(runs, stage) -> Manifest:
    found = newest_manifest(runs / "tiny", stage)
    assert found is not None
    return found


def test_every_version_since_0_2_left_a_pipeline():
    after = [p.name for p in sorted(GOLDEN.glob("[0-9]*")) if p.name != "0.1.0"]
    assert "0.2.0" in after
    assert set(after) <= {p.name for p in VERSIONS}


def test_no_stage_is_run_again(golden, runs):
    job, output = golden / "pipeline.yaml", f"output={runs}"
    planned = json.loads(scldm_command("plan", job, output, "--json"))["stages"]
    assert [s["stage"] for s in planned] == STAGES
    assert {s["state"] for s in planned} == {"done"}
    scldm_command("run", job, output)
    assert [m["stage"] for m in json.loads(scldm_command("runs", "list", runs / "tiny", "--json"))] == STAGES


def test_its_models_make_the_cells_that_they_made(golden, runs):
    expected = json.loads((golden / "expected.json").read_text())
    made = scldm.load(runs / "tiny").generate({"cell_type": "classical monocyte"}, n=3, seed=5).X.tocoo()
    assert (made.row.tolist(), made.col.tolist()) == (expected["row"], expected["column"])
    assert made.data.tolist() == expected["counts"]


def test_its_shards_are_read_and_verify(runs):
    folder = manifest(runs, "generate").folder
    scldm_command("cells", "verify", folder)
    cells = scldm.open_cells(folder).to_anndata()
    assert cells.shape == (40, 40)
    assert np.array_equal(np.asarray(cells.X.sum(1)).ravel(), cells.obs["total_counts"])


def test_its_scores_are_on_the_card_of_its_model(runs):
    found = recorded_scores(scldm.load(runs / "tiny").folders)
    assert found is not None
    assert (found.split, found.version) == ("test", manifest(runs, "evaluate").version)
    assert found.scores["w2"] > 0
    assert found.floor["w2"] > 0


def test_training_starts_from_its_weights(runs):
    own = scldm.load(runs / "tiny")
    vae = VAE(own.vae.vae.config, n_genes=own.vocabulary.n_genes)
    start_vae(vae, own.vocabulary, own.vae)
    cells = CellBatch.from_dense(torch.arange(80.0).reshape(2, 40))
    torch.testing.assert_close(vae.eval().encode(cells), own.vae.vae.encode(cells), rtol=0, atol=0)
    dit = DiT(own.flow.dit.config, n_latent_tokens=3, latent_width=4, n_classes=own.vocabulary.n_classes)
    start_flow(dit, own.vocabulary, own.flow)
    for name, weight in own.flow.dit.state_dict().items():
        torch.testing.assert_close(dit.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", ["train_vae", "train_flow"])
def test_a_training_that_it_left_halfway_goes_on_to_the_same_loss(runs, stage):
    made = manifest(runs, stage)
    folder = Path(made.folder)
    before = losses(folder)
    for name in ("manifest.json", "metrics.jsonl"):
        (folder / name).unlink()
    shutil.rmtree(folder / "model")
    shutil.rmtree(newest(folder / "checkpoints")[0].folder)
    assert newest(folder / "checkpoints")[0].position.step == 6
    inputs = {name: asdict(manifest(runs, name)) for name in made.inputs}
    train({
        "kind": stage.removeprefix("train_"), "config": made.config, "inputs": inputs, "folder": str(folder),
        "version": made.version, "seed": 0, "feed_engine": "local", "tracker": {}, "run_name": "",
    }, world_size=1)  # fmt: skip
    after = losses(folder)
    assert after.keys() == {12}, "the first six steps are not done again"
    assert after[12] == pytest.approx(before[12], rel=1e-3)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}


# ---- newer versions ----------------------------------------------------------------------------------------------
def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_a_newer_version_wrote_is_refused_with_the_remedy(golden, runs):
    vae = Path(manifest(runs, "train_vae").folder)
    change(vae / "model" / "config.json", format=2)
    with pytest.raises(CheckpointError, match=r"newer version of scldm \(format 2, this version reads 1\)"):
        load_vae(vae / "model")
    change(vae / "manifest.json", format=2, something_new={})
    for command in (("plan", golden / "pipeline.yaml", f"output={runs}"), ("runs", "list", runs / "tiny")):
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 2
        assert "newer version of scldm (format 2, this version reads 1); upgrade scldm" in result.output
    with pytest.raises(CheckpointError, match="newer version"):
        scldm.load(vae)
