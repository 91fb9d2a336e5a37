"""Opening the Census by version, without a network."""

import cellxgene_census
import pytest

from pipeline.data.census import TRIES, locate_census
from pipeline.job import CensusSource
from pipeline.stage import InputError

DIRECTORY = {
    "stable": {"soma": {"uri": "s3://bucket/2025-01-30/soma/", "s3_region": "us-west-2"}, "flags": {"lts": True}},
    "2025-01-30": {"soma": {"uri": "s3://bucket/2025-01-30/soma/", "s3_region": "us-west-2"}, "flags": {"lts": True}},
    "2025-03-03": {"soma": {"uri": "s3://bucket/2025-03-03/soma/", "s3_region": "us-west-2"}, "flags": {"lts": False}},
}


def source(version):
    return CensusSource(type="census", version=version)


@pytest.fixture
def reachable(monkeypatch):
    monkeypatch.setattr(cellxgene_census, "get_census_version_directory", lambda: DIRECTORY)


def test_a_dated_release_becomes_a_plain_address(reachable):
    store = locate_census(source("2025-01-30"))
    assert store.uri == "s3://bucket/2025-01-30/soma/census_data/homo_sapiens"
    assert store.tiledb_config == {"vfs.s3.no_sign_request": "true", "vfs.s3.region": "us-west-2"}
    assert (store.measurement, store.layer) == ("RNA", "raw")


@pytest.mark.parametrize("version", ["stable", "latest"])
def test_moving_names_are_refused_with_what_to_pin(reachable, version):
    with pytest.raises(InputError, match=r"long-term releases: 2025-01-30$"):
        locate_census(source(version))


def test_an_unknown_release_is_answered_with_the_nearest(reachable):
    with pytest.raises(InputError, match=r"no release '2025-01-31'.*did you mean '2025-01-30'"):
        locate_census(source("2025-01-31"))


def test_no_network_is_said_after_bounded_tries(monkeypatch):
    calls, waits = [], []

    def fail():
        calls.append(1)
        raise ConnectionError("no route")

    monkeypatch.setattr(cellxgene_census, "get_census_version_directory", fail)
    with pytest.raises(InputError, match="could not be reached in 4 tries"):
        locate_census(source("2025-01-30"), sleep=waits.append)
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
    assert locate_census(source("2025-01-30"), sleep=lambda _: None).uri.endswith("homo_sapiens")
