"""Opening the Census by version, without a network."""

import cellxgene_census
import pytest

from pipeline.config.job import CensusSource, IngestConfig
from pipeline.data.sources.census import TRIES, locate_census
from pipeline.data.sources.open import open_source
from scldm.errors import InputError


def release(date, **flags):
    soma = {"uri": f"s3://bucket/{date}/soma/", "s3_region": "us-west-2"}
    return {"release_build": date, "soma": soma, "flags": flags}


DIRECTORY = {
    "stable": release("2025-01-30", lts=True),
    "latest": release("2025-03-03"),
    "2025-01-30": release("2025-01-30", lts=True),
    "2025-03-03": release("2025-03-03"),
}


def source(version):
    return CensusSource(type="census", version=version)


@pytest.fixture
def reachable(monkeypatch):
    monkeypatch.setattr(cellxgene_census, "get_census_version_directory", lambda: DIRECTORY)


def test_a_dated_release_becomes_a_plain_address(reachable):
    found = locate_census(source("2025-01-30"))
    assert found.version == "2025-01-30"
    assert found.store.uri == "s3://bucket/2025-01-30/soma/census_data/homo_sapiens"
    assert found.store.tiledb_config == {"vfs.s3.no_sign_request": "true", "vfs.s3.region": "us-west-2"}
    assert (found.store.measurement, found.store.layer) == ("RNA", "raw")


@pytest.mark.parametrize(("name", "date"), [("stable", "2025-01-30"), ("latest", "2025-03-03")])
def test_names_that_move_become_the_date_they_stand_for(reachable, tmp_path, name, date):
    config = IngestConfig.model_validate({"source": {"type": "census", "version": name}})
    opened = open_source(config, tmp_path, [])
    assert opened.facts == {"census_version": date, "census_version_asked": name}
    assert opened.uri == f"s3://bucket/{date}/soma/census_data/homo_sapiens"
    assert opened.description == f"CELLxGENE Census {date}, homo_sapiens"
    assert any(f"{name} stood for {date}" in note and f"version: {date}" in note for note in opened.notes)


def test_a_pinned_release_needs_no_note(reachable, tmp_path):
    config = IngestConfig.model_validate({"source": {"type": "census", "version": "2025-01-30"}})
    assert open_source(config, tmp_path, []).notes == []


def test_a_name_without_a_date_is_refused(monkeypatch):
    moved = {"stable": {**DIRECTORY["stable"], "release_build": None}}
    monkeypatch.setattr(cellxgene_census, "get_census_version_directory", lambda: moved)
    with pytest.raises(InputError, match="does not say which date it stands for"):
        locate_census(source("stable"))


def test_a_release_that_gives_its_path_only_lies_on_the_mirror(monkeypatch):
    by_path = {"2025-11-08": {"release_build": "2025-11-08", "soma": {"relative_uri": "/cell-census/2025-11-08/soma/"}}}
    mirrors = {"aws": {"provider": "S3", "base_uri": "s3://mirror/", "region": "us-east-1"}}
    monkeypatch.setattr(cellxgene_census, "get_census_version_directory", lambda: by_path)
    monkeypatch.setattr(cellxgene_census, "get_census_mirror_directory", lambda: mirrors)
    found = locate_census(source("2025-11-08"))
    assert found.store.uri == "s3://mirror/cell-census/2025-11-08/soma/census_data/homo_sapiens"
    assert found.store.tiledb_config["vfs.s3.region"] == "us-east-1"


@pytest.mark.row("D:census-absent")
def test_an_unknown_release_is_answered_with_the_nearest(reachable):
    with pytest.raises(InputError, match=r"no release '2025-01-31'.*did you mean '2025-01-30'"):
        locate_census(source("2025-01-31"))
    with pytest.raises(InputError, match=r"no release 'stabel'.*did you mean 'stable'"):
        locate_census(source("stabel"))


@pytest.mark.parametrize("version", ["2025-01-30", "stable"])
def test_no_network_is_said_after_bounded_tries(monkeypatch, version):
    calls, waits = [], []

    def fail():
        calls.append(1)
        raise ConnectionError("no route")

    monkeypatch.setattr(cellxgene_census, "get_census_version_directory", fail)
    with pytest.raises(InputError, match="could not be reached in 4 tries"):
        locate_census(source(version), sleep=waits.append)
    assert len(calls) == TRIES
    assert waits == [1.0, 2.0, 4.0]


def test_a_passing_failure_is_survived(monkeypatch):
    answers = [ConnectionError("blip"), DIRECTORY]

    def flaky():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(cellxgene_census, "get_census_version_directory", flaky)
    assert locate_census(source("2025-01-30"), sleep=lambda _: None).store.uri.endswith("homo_sapiens")
