"""Upstream's published files, from a local S3: listed, resumed, checked, recorded and converted."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import boto3
import pytest
from helpers.models.exported_model import new_export
from helpers.servers.s3_server import moto_server
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config.s3 import S3Client
from pipeline.data.sources import published
from pipeline.data.sources.published import BUCKET, REGION, PublishedFiles
from scldm.api.folders import find_models
from scldm.errors import InputError

CONTENT = bytes(range(256)) * 40_000  # 10 MB: three pieces


@pytest.fixture(scope="module")
def address():
    with moto_server() as server:
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        client = boto3.client("s3", endpoint_url=server, region_name=REGION, **keys)
        client.create_bucket(Bucket=BUCKET, ACL="public-read", CreateBucketConfiguration={"LocationConstraint": REGION})
        for key, body in (("datasets/cells.h5ad", CONTENT), ("datasets/small.h5ad", b"few"), ("other/x", b"x")):
            client.put_object(Bucket=BUCKET, Key=key, Body=body, ACL="public-read")
        yield server


@pytest.fixture
def files(address):
    return PublishedFiles(S3Client(endpoint=address, addressing="path"))


def test_files_of_a_group_are_listed_with_their_sizes(files):
    assert [(f.key, f.size) for f in files.list(["datasets"])] == [
        ("datasets/cells.h5ad", len(CONTENT)),
        ("datasets/small.h5ad", 3),
    ]
    with pytest.raises(InputError, match="no group models; upstream publishes datasets, vae_census"):
        files.list(["models"])
    with pytest.raises(InputError, match="holds nothing in vae_census"):
        files.list(["vae_census"])


def test_an_interrupted_download_goes_on_where_it_stopped(files, tmp_path):
    file = files.list(["datasets"])[0]
    read: list[int] = []

    def stop(n: int) -> None:
        read.append(n)
        if len(read) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.download(file, tmp_path, stop)
    assert not (tmp_path / file.key).exists()
    rest: list[int] = []
    assert files.download(file, tmp_path, rest.append)
    assert (tmp_path / file.key).read_bytes() == CONTENT
    assert rest[0] == sum(read), "the bar begins at what is there"
    assert sum(rest[1:]) == len(CONTENT) - sum(read)
    assert sorted(p.name for p in (tmp_path / "datasets").iterdir()) == ["cells.h5ad"]
    recorded = json.loads((tmp_path / "downloads.json").read_text())
    assert recorded[file.key] == {"sha256": hashlib.sha256(CONTENT).hexdigest(), "size": len(CONTENT)}
    whole: list[int] = []
    assert not files.download(file, tmp_path, whole.append), "nothing is read twice"
    assert whole == [len(CONTENT)]


def test_the_rest_of_another_object_is_not_appended(files, tmp_path):
    file = files.list(["datasets"])[0]
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "cells.h5ad.part").write_bytes(b"an older object")
    (tmp_path / "datasets" / "cells.h5ad.part.etag").write_text("another")
    files.download(file, tmp_path, lambda _: None)
    assert (tmp_path / file.key).read_bytes() == CONTENT


def test_content_that_is_not_what_the_store_states_or_what_was_recorded_is_refused(files, tmp_path, monkeypatch):
    file = files.list(["datasets"])[1]
    files.download(file, tmp_path, lambda _: None)
    (tmp_path / file.key).write_bytes(b"bad")
    with pytest.raises(InputError, match="another content than when it was first downloaded"):
        files.download(file, tmp_path, lambda _: None)
    (tmp_path / file.key).unlink()
    real = published._digest
    monkeypatch.setattr(published, "_digest", lambda path, name: "0" * 32 if name == "md5" else real(path, name))
    with pytest.raises(InputError, match=r"has MD5 0000.* and the store states"):
        files.download(file, tmp_path, lambda _: None)
    assert not (tmp_path / file.key).exists()


def test_an_object_that_ends_too_early_is_no_file(files, tmp_path):
    file = files.list(["datasets"])[1]
    with pytest.raises(InputError, match="ended after 3 of 7 bytes; run the same command again"):
        files.download(replace(file, size=7), tmp_path, lambda _: None)
    assert not (tmp_path / file.key).exists()
    assert files.download(file, tmp_path, lambda _: None), "what was read is gone on with"
    assert (tmp_path / file.key).read_bytes() == b"few"


def test_a_store_that_does_not_answer_is_named(tmp_path):
    files = PublishedFiles(S3Client(endpoint="http://127.0.0.1:9", addressing="path", tries=1))
    with pytest.raises(InputError, match=r"s3://czi-scldm/datasets cannot be read .*run the same command again"):
        files.list(["datasets"])


def test_the_command_lists_downloads_and_converts(address, tmp_path, monkeypatch):
    exported = new_export(tmp_path / "export", monkeypatch)
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    client = boto3.client("s3", endpoint_url=address, region_name=REGION, **keys)
    for path in (p for p in exported.folder.iterdir() if p.is_file()):
        name = {"config.yaml": f"{exported.checkpoint.stem}.yaml"}.get(path.name, path.name)
        client.put_object(Bucket=BUCKET, Key=f"resubmission/{name}", Body=path.read_bytes(), ACL="public-read")
    words = ["download", "resubmission", "--endpoint", address, "--out", str(tmp_path / "models")]
    listed = CliRunner().invoke(app, [*words, "--dry-run"])
    assert listed.exit_code == 0, listed.output
    assert f"resubmission/{exported.checkpoint.name}" in listed.output
    assert not (tmp_path / "models").exists()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert find_models(tmp_path / "models" / "converted" / exported.checkpoint.stem).vae.is_dir()
    again = CliRunner().invoke(app, words)
    assert "there already" in again.output
