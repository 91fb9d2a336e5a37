"""Models elsewhere are fetched once, whole, and by version: from S3, MLflow's registry and the hub's cache."""

from __future__ import annotations

import json
import os
from urllib.parse import urlsplit

import pytest
from helpers.models.small_models import CELL_TYPES, write_flow, write_vae
from helpers.servers.s3_server import REGION, moto_server, upload

from pipeline.config.paths import remote_models
from pipeline.inference.models import model_on_every_node
from pipeline.tracking.mlflow_runs.client import mlflow_client
from pipeline.tracking.mlflow_runs.register import register
from scldm.api.folders import find_model, find_models
from scldm.checkpoints.native import folder_digest
from scldm.errors import CheckpointError


@pytest.fixture(autouse=True)
def another_command():
    """A process asks once for a name."""
    remote_models.fetch.cache_clear()


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.setenv("SCLDM_CACHE", str(tmp_path / "cache"))
    write_vae(tmp_path / "pair" / "vae", CELL_TYPES)
    write_flow(tmp_path / "pair" / "flow", CELL_TYPES)
    return tmp_path / "pair"


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache" / "models").iterdir())


def test_a_model_in_a_bucket_is_fetched_once_and_again_when_it_changes(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with moto_server() as address:
        upload(address, "models", pair, "census/v1")
        options = f"endpoint_override={urlsplit(address).netloc}&scheme=http&region={REGION}"
        name = f"s3://models/census/v1?{options}"
        found = find_model(name, "vae")
        assert folder_digest(found) == folder_digest(pair / "vae")
        assert folder_digest(find_model(name, "flow")) == folder_digest(pair / "flow")
        assert len(cached(tmp_path)) == 1
        write_vae(pair / "vae", CELL_TYPES, n_layers=2)
        import boto3

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        client = boto3.client("s3", endpoint_url=address, region_name=REGION, **keys)
        for path in (pair / "vae").iterdir():
            client.put_object(Bucket="models", Key=f"census/v1/vae/{path.name}", Body=path.read_bytes())
        assert find_model(name, "vae") == found, "one version in one command"
        remote_models.fetch.cache_clear()
        assert folder_digest(find_model(name, "vae")) == folder_digest(pair / "vae")
        assert len(cached(tmp_path)) == 2
        shared = model_on_every_node(name, "vae", tmp_path / "runs")
        assert shared.parent == tmp_path / "runs" / ".models"
        assert folder_digest(shared) == folder_digest(pair / "vae")
        assert model_on_every_node(name, "vae", tmp_path / "runs") == shared
        assert len(list(shared.parent.iterdir())) == 1
        with pytest.raises(CheckpointError, match="holds no model"):
            find_model(f"s3://models/nothing?{options}", "vae")
    remote_models.fetch.cache_clear()
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        find_model(name, "vae")


def test_half_a_download_leaves_nothing(pair, tmp_path):
    def download(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise ConnectionError("the line went dead")

    with pytest.raises(ConnectionError):
        remote_models._cached(["a version"], download)
    assert cached(tmp_path) == []


def test_a_registered_model_is_found_by_alias_and_by_number(pair, tmp_path, monkeypatch):
    for stage, inputs in (("train_vae", {}), ("train_flow", {"train_vae": "1"})):
        folder = tmp_path / "runs" / "census" / stage / "1"
        folder.mkdir(parents=True)
        (pair / stage.removeprefix("train_")).rename(folder / "model")
        manifest = {
            "stage": stage, "version": "1", "folder": str(folder), "config": {}, "inputs": inputs,
            "facts": {"model": "model"}, "seconds": 1.0, "finished_at": 1.0,
        }  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(manifest))
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registered = register(tmp_path / "runs" / "census", uri=uri, name="census", aliases=("champion",))
    assert os.environ.get("MLFLOW_TRACKING_URI") is None, "MLflow's default is what it was"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    own = find_models(tmp_path / "runs" / "census")
    for name in ("models:/census@champion", f"models:/census/{registered.version}"):
        assert folder_digest(find_model(name, "vae")) == folder_digest(own.vae)
        assert folder_digest(find_model(name, "flow")) == folder_digest(own.flow)
    assert len(cached(tmp_path)) == 1, "both are one version"
    with pytest.raises(CheckpointError, match=r"names no version; write models:/census@ALIAS or models:/census/NUMBER"):
        find_model("models:/census", "vae")
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        find_model("models:/census@other", "vae")
    mlflow_client(uri).create_registered_model("foreign")


def test_a_repository_of_the_hub_is_taken_from_its_cache_and_without_code(pair, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--lab--census"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text("c0ffee")
    (repository / "snapshots").mkdir()
    pair.rename(repository / "snapshots" / "c0ffee")
    for name in ("hf://lab/census@v1", "lab/census@v1"):
        assert find_model(name, "flow") == repository / "snapshots" / "c0ffee" / "flow"
    with pytest.raises(CheckpointError, match="hf://lab/census@v2 cannot be fetched"):
        find_model("hf://lab/census@v2", "vae")
    with pytest.raises(CheckpointError, match="write hf://ORGANISATION/NAME@REVISION"):
        find_model("hf://census", "vae")
