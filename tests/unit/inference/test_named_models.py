"""A model is named in one way by every job: a folder, a pair, a stage, a pipeline, a registry, a bucket."""

from __future__ import annotations

import json
import shutil

import anndata as ad
import numpy as np
import pytest
import torch
import yaml
from helpers.models.small_models import CELL_TYPES, DONORS, GENES, library_sizes, write_flow, write_vae
from helpers.stages.generation_case import NoTracker, generate, hashes, write_inputs

import scldm
from pipeline.config.context import StageContext
from pipeline.config.io.loader import load_job
from pipeline.config.job import ResourcesConfig, TrainVaeConfig
from pipeline.core.manifest import Manifest, write_manifest
from pipeline.stages import train_vae
from pipeline.workflow import schedule
from pipeline.workflow.preflight import check_settings
from scldm.api.folders import find_model
from scldm.checkpoints.native import folder_digest, load_vae
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.errors import CheckpointError, InputError

SOURCE = {"type": "synthetic", "n_cells": 100, "n_genes": 50}


@pytest.fixture
def pair(tmp_path):
    write_vae(tmp_path / "pair" / "vae", CELL_TYPES, DONORS)
    write_flow(tmp_path / "pair" / "flow", CELL_TYPES, DONORS)
    return tmp_path / "pair"


def stage(pair, root, name, *, inputs=None, at=1.0, version="a1"):
    """A finished stage with the model of a pair."""
    folder = root / name / version
    folder.mkdir(parents=True)
    shutil.copytree(pair / name.removeprefix("train_"), folder / "model")
    manifest = {
        "stage": name, "version": version, "folder": str(folder), "config": {}, "inputs": inputs or {},
        "facts": {"model": "model"}, "seconds": 1.0, "finished_at": at,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_all_names_of_a_model_find_the_same_folder(pair, tmp_path):
    root = tmp_path / "runs" / "census"
    vae = stage(pair, root, "train_vae")
    flow = stage(pair, root, "train_flow", inputs={"train_vae": "a1"})
    for name in (root, root / "train_flow", flow, root / "train_vae", vae, vae / "model"):
        assert find_model(name, "vae") == vae / "model"
    for name in (root, root / "train_flow", flow, flow / "model"):
        assert find_model(name, "flow") == flow / "model"
    assert find_model(pair, "vae") == pair / "vae"
    assert find_model(str(pair), "flow") == pair / "flow"


def test_the_name_of_a_stage_stands_for_its_newest_version(pair, tmp_path):
    stage(pair, tmp_path, "train_vae", at=2.0, version="newer")
    stage(pair, tmp_path, "train_vae", at=1.0, version="older")
    assert find_model(tmp_path / "train_vae", "vae") == tmp_path / "train_vae" / "newer" / "model"


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("pair/flow", "vae", "holds a flow, expected a vae"),
        ("nowhere", "vae", "is no folder"),
        ("org/name", "vae", "or hf://org/name for the hub"),
        ("pair/vae", "flow", "holds a vae, expected a flow"),
        ("models:/census", "vae", "MLFLOW_TRACKING_URI"),
    ],
)
def test_a_name_of_nothing_usable_says_what_is_there_and_what_to_write(pair, name, kind, words, monkeypatch):
    monkeypatch.chdir(pair.parent)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(CheckpointError, match=words):
        find_model(name, kind)


def test_a_model_that_lacks_a_file_is_refused_before_anything_starts(pair):
    (pair / "vae" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing; copy it again"):
        find_model(pair, "vae")


@pytest.mark.parametrize(
    ("kind", "settings", "uses_flow"),
    [
        ("embed", {}, False),
        ("reconstruct", {}, False),
        ("perturb", {"to": {"cell_type": "B"}}, True),
        ("log_likelihood", {}, False),
        ("log_likelihood", {"flow": {}}, True),
    ],
)
def test_one_name_gives_a_job_the_models_that_it_uses(pair, tmp_path, kind, settings, uses_flow):
    job = write_job(tmp_path, kind=kind, source=SOURCE, model=str(pair), **settings)
    assert job.model.vae == str(pair)
    assert job.model.flow == (str(pair) if uses_flow else None)


# ---- generation --------------------------------------------------------------------------------------------------
def test_a_job_of_named_models_makes_the_cells_of_the_same_models_in_a_pipeline(tmp_path):
    inputs = write_inputs(tmp_path / "inputs")
    settings = {"cells": [{"cell_type": "B", "n_cells": 5}, {"n_cells": 3}], "shard_size": 4, "sampler": {"steps": 2}}
    names = {"vae": str(tmp_path / "inputs/train_vae/model"), "flow": str(tmp_path / "inputs/train_flow/model")}
    own, named = tmp_path / "own", tmp_path / "named"
    generate(own, inputs, **settings)
    facts = generate(named, {}, model=names, **settings)
    assert facts["n_cells"] == 8
    for shard in sorted(hashes(own)):
        a, b = ad.read_h5ad(own / shard), ad.read_h5ad(named / shard)
        assert (a.X != b.X).nnz == 0
        assert np.array_equal(a.obsm["X_scldm"], b.obsm["X_scldm"])
    model = scldm.load(names["vae"], flow=names["flow"])
    assert model.labels["cell_type"] == CELL_TYPES.classes


def write_job(folder, **settings):
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "output": str(folder / "runs"), **settings}))
    return load_job(path, [])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"per_label": {"tissue": 5}}, "no label 'tissue'; the model knows: cell_type, donor"),
        ({"cells": [{"cell_type": "Bb", "n_cells": 5}]}, "cell_type has no class 'Bb'"),
        ({}, "generate does not say which cells to make"),
    ],
)
def test_what_named_models_do_not_know_is_refused_before_anything_starts(pair, tmp_path, settings, words):
    job = write_job(tmp_path, kind="generate", model=str(pair), **settings)
    with pytest.raises(InputError, match=words):
        check_settings(job)


def test_a_vae_and_a_flow_of_different_models_are_refused_before_anything_starts(pair, tmp_path):
    write_flow(tmp_path / "other", CELL_TYPES)
    names = {"vae": str(pair), "flow": str(tmp_path / "other")}
    job = write_job(tmp_path, kind="generate", model=names, n_cells=3)
    with pytest.raises(InputError, match="trained with different vocabularies"):
        check_settings(job)


# ---- training ----------------------------------------------------------------------------------------------------
def test_a_pretrained_vae_brings_its_sizes_and_its_genes(pair, tmp_path):
    text = {"kind": "train_vae", "ingest": {"source": SOURCE}, "model": str(pair), "train": False}
    job = write_job(tmp_path, **text)
    assert job.pretrained == str(pair)
    assert job.model.d_model == 8
    assert job.ingest.genes.vocabulary == str(pair)
    assert job == write_job(
        tmp_path, **{k: v for k, v in text.items() if k not in ("model", "train")}, pretrained=str(pair)
    )


def test_training_from_weights_takes_their_sizes_and_what_is_set_besides(pair, tmp_path):
    job = write_job(tmp_path, kind="train_vae", start_from=str(pair), model={"head": "nb_cell"})
    assert (job.model.d_model, job.model.head) == (8, "nb_cell")
    flow = write_job(tmp_path, kind="train_flow", start_from={"model": str(pair), "parents": {"cell_type": {"A": "B"}}})
    assert flow.model.d_model == 12
    assert flow.start_from.parents == {"cell_type": {"A": "B"}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "PAIR"}, r"to use it as it is, set train: false as well; to train on .* start_from: "),
        ({"train": False}, "name it, model: runs/census"),
        ({"pretrained": "PAIR", "model": {"d_model": 16}}, "model.d_model is that of .* and cannot be set"),
        ({"pretrained": "PAIR", "start_from": "PAIR"}, "leave one of them out"),
        ({"start_from": "nowhere"}, "is no folder"),
    ],
)
def test_settings_of_models_that_contradict_each_other_are_refused(pair, tmp_path, settings, words):
    named = {k: str(pair) if v == "PAIR" else v for k, v in settings.items()}
    with pytest.raises(InputError, match=words):
        write_job(tmp_path, kind="train_vae", **named)


def pretrained(pair, folder, genes):
    """Run train_vae with a VAE as it is, on data of some genes; its folder and facts."""
    ingest = folder / "ingest"
    ingest.mkdir(parents=True)
    Vocabulary(genes, genes, (LabelVocabulary("tissue", ("gut", "lung")),)).save(ingest / "vocabulary.json")
    library_sizes().save(ingest / "library_size.json")
    facts = {
        "vocabulary": "vocabulary.json", "library_size": "library_size.json", "digest": "abc", "n_cells": {"train": 4},
        "n_genes": len(genes), "labels": ["tissue"],
    }  # fmt: skip
    inputs = {"ingest": Manifest("ingest", "0", str(ingest), {}, {}, facts, seconds=0, finished_at=0)}
    stage = folder / "train_vae"
    stage.mkdir()
    context = StageContext(stage, inputs, 0, ResourcesConfig(), NoTracker())
    return stage, train_vae.run(TrainVaeConfig(pretrained=str(pair)), context)


def test_a_pretrained_vae_keeps_its_weights_and_gets_the_labels_of_the_data(pair, tmp_path):
    folder, facts = pretrained(pair, tmp_path / "own", GENES)
    made, given = load_vae(folder / facts["model"]), load_vae(pair / "vae")
    assert all(torch.equal(x, made.vae.state_dict()[k]) for k, x in given.vae.state_dict().items())
    assert [x.name for x in made.vocabulary.labels] == ["tissue"]
    assert facts["latent_shape"] == [3, 4]
    assert facts["pretrained"] == {"name": str(pair), "digest": folder_digest(pair / "vae")}


@pytest.mark.parametrize("genes", [GENES[::-1], GENES[1:], (*GENES[1:], "other")], ids=["order", "fewer", "other"])
def test_data_with_other_genes_than_the_pretrained_model_are_refused_with_the_setting(pair, tmp_path, genes):
    with pytest.raises(InputError) as refused:
        pretrained(pair, tmp_path / "own", genes)
    setting = str(refused.value).rpartition("ingest.")[2]
    assert setting == f"genes.vocabulary={pair}"
    job = write_job(tmp_path, kind="ingest", source=SOURCE)
    key, value = setting.split("=")
    assert load_job(tmp_path / "job.yaml", [f"{key}={value}"]).genes.vocabulary == str(pair) != job.genes.vocabulary


def test_a_job_that_was_sent_with_its_code_finds_the_models_of_earlier_jobs(pair, tmp_path, monkeypatch):
    package = tmp_path / "_ray_pkg_1a2b"
    package.mkdir()
    monkeypatch.chdir(package)
    monkeypatch.setenv("SCLDM_HOME", str(tmp_path))
    job = write_job(package, kind="generate", model="pair", n_cells=3)
    assert job.model.vae == job.model.flow == str(pair)
    assert write_job(package, kind="train_flow", start_from="pair/flow").start_from.model == str(pair / "flow")


# ---- evaluation --------------------------------------------------------------------------------------------------
def finished(root, name, inputs):
    folder = root / "runs" / "mine" / name / "a1"
    folder.mkdir(parents=True)
    write_manifest(Manifest(name, "a1", str(folder), {}, inputs, {"n_cells": {"test": 9}}, 1.0, 1.0))


@pytest.mark.parametrize(
    ("made_from", "read"),
    [({}, ["generate", "ingest"]), ({"ingest": "a1"}, ["generate", "ingest"])],
    ids=["a table", "like a split"],
)
def test_cells_of_named_models_are_scored_without_a_vae_of_the_pipeline(tmp_path, monkeypatch, made_from, read):
    monkeypatch.setattr(schedule, "check_experiment", lambda *_: None)
    finished(tmp_path, "ingest", {})
    finished(tmp_path, "generate", made_from)
    resolved = schedule.resolve(write_job(tmp_path, kind="evaluate"))
    assert not resolved.missing
    assert sorted(resolved.steps[0].inputs) == read


def test_cells_of_the_pipelines_own_models_are_scored_with_its_vae(tmp_path):
    finished(tmp_path, "ingest", {})
    finished(tmp_path, "generate", {"ingest": "a1", "train_vae": "v1", "train_flow": "f1"})
    resolved = schedule.resolve(write_job(tmp_path, kind="evaluate"))
    assert [m.stage for m in resolved.missing] == ["train_vae"]
