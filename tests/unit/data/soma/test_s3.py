"""Cells in object storage: read exactly, through failures that pass; failures that stay are told apart, quickly."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers.servers.s3_server import REGION, FaultyProxy, free_port, moto_server, upload

from pipeline.config.input_paths import input_contents
from pipeline.config.job import IngestConfig
from pipeline.config.s3 import S3Config
from pipeline.data.inspection.examine import Question, examine
from pipeline.data.soma.retry import Backoff, retried
from pipeline.data.soma.s3_errors import failure
from pipeline.data.soma.store import SomaStore
from pipeline.data.soma.write import write_experiment
from pipeline.data.sources.open import open_source
from scldm.errors import InputError

N, G, TILE = 600, 50, 64


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The experiment on disk."""
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(0.4, (N, G)).astype(np.float32))
    obs = pd.DataFrame({"cell_type": pd.Categorical(rng.choice(["a", "b", "c"], N)), "is_primary_data": True})
    obs = obs.assign(**{f"measured_{i}": np.arange(N) + i for i in range(16)})  # columns are read in parallel
    var = pd.DataFrame({"feature_id": [f"g{i}" for i in range(G)], "feature_name": "x", "feature_length": 0})
    return write_experiment(tmp_path_factory.mktemp("s3") / "soma", obs, var, [counts], tile=TILE)


@pytest.fixture(scope="module")
def proxy(local):
    pytest.importorskip("moto", reason="moto[server] is in the dev extra")
    with moto_server() as address:
        upload(address, "cells", Path(local.uri), "exp")
        upload(address, "public", Path(local.uri), "exp", public=True)
        server = FaultyProxy(address)
        yield server
        server.close()


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                        "AWS_EC2_METADATA_DISABLED": "true"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.fixture
def waits(monkeypatch):
    """What is waited between tries, without the waiting."""
    waited: list[float] = []
    monkeypatch.setitem(retried.__kwdefaults__, "sleep", waited.append)
    return waited


def opened(address, tmp_path, uri="s3://cells/exp", region=REGION, anonymous=False, **s3):
    settings = {"endpoint": address, "addressing": "path", "tries": 1, **s3}
    source = {"type": "soma", "uri": uri, "region": region, "anonymous": anonymous, "s3": settings}
    store = open_source(IngestConfig.model_validate({"source": source}), tmp_path, []).store
    store.forget()
    return store


def assert_same(a: SomaStore, b: SomaStore) -> None:
    ids = np.random.default_rng(1).permutation(N)
    left, right = a.read_ragged(ids), b.read_ragged(ids)
    for name in ("indptr", "genes", "counts"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_an_experiment_in_a_bucket_equals_the_one_on_disk(proxy, local, tmp_path):
    proxy.heal()
    store = opened(proxy.address, tmp_path)
    assert_same(store, local)
    pd.testing.assert_frame_equal(store.obs(), local.obs())
    pd.testing.assert_frame_equal(store.var(), local.var())
    assert (store.shape, store.tile) == ((N, G), TILE)
    few = store.obs(["cell_type"], "cell_type == 'b'")
    pd.testing.assert_frame_equal(few, local.obs(["cell_type"], "cell_type == 'b'"))


def test_a_public_bucket_is_read_without_an_account(proxy, local, tmp_path, monkeypatch):
    proxy.heal()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert_same(opened(proxy.address, tmp_path, uri="s3://public/exp", anonymous=True), local)


def test_validate_data_reads_a_bucket(proxy):
    proxy.heal()
    [found] = examine(Question("s3://cells/exp", labels=("cell_type",), region=REGION, endpoint=proxy.address))
    assert found.errors == []
    assert found.facts["cells"] == N
    [found] = examine(Question("s3://nobody/exp", region=REGION, endpoint=proxy.address))
    assert "there is no bucket 'nobody'" in found.errors[0].what


@pytest.mark.parametrize("fault", [(500, "InternalError"), "reset"], ids=["500", "reset"])
@pytest.mark.row("D:s3-failures")
def test_failures_that_pass_are_survived(proxy, local, tmp_path, monkeypatch, fault):
    proxy.heal()
    store, waits = opened(proxy.address, tmp_path), []
    _ = store.shape, store.tile

    def heals_after_three(seconds):
        waits.append(seconds)
        proxy.always = fault if len(waits) < 3 else None

    monkeypatch.setitem(retried.__kwdefaults__, "sleep", heals_after_three)
    proxy.always = fault
    assert_same(store, local)
    assert len(waits) == 3
    assert all(0.5 <= wait < 4 for wait in waits)
    assert len(set(waits)) == 3  # jitter


@pytest.mark.row("D:s3-failures")
def test_slow_down_is_survived(proxy, local, tmp_path, waits):
    proxy.heal()
    store = opened(proxy.address, tmp_path)
    proxy.faults = [(503, "SlowDown")] * 2  # TileDB itself repeats these, 1.5 s apart
    assert_same(store, local)
    assert proxy.faults == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ((403, "AccessDenied"), r"server refuses access \[HTTP 403 AccessDenied\]; check the credentials"),
        ((400, "ExpiredToken"), r"server refuses access \[HTTP 400 ExpiredToken\]"),
        ((404, "NoSuchBucket"), r"there is no bucket 'cells'"),
        ((301, "PermanentRedirect"), r"another region .*set ingest.source.region"),
        (
            (500, "InternalError"),
            r"keeps failing; gave up after 5 tries in \d+ s .*lower ingest\.source\.s3\.max_par",
        ),
    ],
    ids=lambda x: x[1] if isinstance(x, tuple) else "",
)
@pytest.mark.row("D:s3-failures")
def test_failures_that_stay_are_told_apart(proxy, tmp_path, waits, fault, words):
    proxy.heal()
    proxy.always = fault
    began = time.monotonic()
    with pytest.raises(InputError, match=words) as error:
        _ = opened(proxy.address, tmp_path).shape
    assert f"s3://cells/exp (region {REGION}, server {proxy.address.removeprefix('http://')}" in str(error.value)
    assert len(waits) == (4 if fault[0] == 500 else 0)
    assert time.monotonic() - began < 20


def test_a_refused_stranger_is_told_to_give_credentials(proxy, tmp_path):
    proxy.heal()
    with pytest.raises(InputError, match=r"without credentials.*set ingest.source.anonymous: false"):
        _ = opened(proxy.address, tmp_path, anonymous=True).shape


def test_a_missing_bucket_and_a_missing_experiment_are_two_things(proxy, tmp_path):
    proxy.heal()
    with pytest.raises(InputError, match="there is no bucket 'nobody'"):
        _ = opened(proxy.address, tmp_path, uri="s3://nobody/exp").shape
    with pytest.raises(InputError, match=r"cannot open .* of the SOMA experiment s3://cells/nothing"):
        _ = opened(proxy.address, tmp_path, uri="s3://cells/nothing").shape


@pytest.mark.row("D:s3-failures")
def test_a_dead_server_is_said_in_time(tmp_path, waits):
    began = time.monotonic()
    with pytest.raises(InputError) as error:
        _ = opened(f"http://127.0.0.1:{free_port()}", tmp_path).shape
    assert time.monotonic() - began < 20
    for words in ("s3://cells/exp", f"region {REGION}", "cannot be reached; gave up after 5 tries", "Could not connect",
                  "check the network", "read a copy on disk"):  # fmt: skip
        assert words in str(error.value)
    assert len(waits) == 4


def test_requests_in_flight_are_limited(proxy, local, tmp_path):
    most = {}
    for max_parallel in (1, 6):
        proxy.heal()
        proxy.delay = 0.03
        pd.testing.assert_frame_equal(opened(proxy.address, tmp_path, max_parallel=max_parallel).obs(), local.obs())
        most[max_parallel] = proxy.most_in_flight
    proxy.heal()
    assert most[1] <= 3 < 5 <= most[6] <= 8  # the two computing threads may read while they wait


# ---- without a server ----------------------------------------------------------------------------------------------
def run(errors, backoff, times=None):
    """Outcome and waits of a read that raises `errors` in turn, on a clock that only waiting moves."""
    waited, left = [], list(errors)

    def read():
        if left:
            raise left.pop(0)
        return "cells"

    result = retried(
        read, uri="s3://b/e", tiledb_config={}, reopen=lambda: None, backoff=backoff, sleep=waited.append,
        clock=lambda: sum(waited), draw=lambda: 0.999,
    )  # fmt: skip
    return result, waited


BUSY = RuntimeError("S3: x [HTTP Response Code: 503] [Exception: SlowDown] y")


def test_waits_double_up_to_the_longest():
    result, waited = run([BUSY] * 4, Backoff(tries=5, first=1, longest=3, budget=100))
    assert result == "cells"
    np.testing.assert_allclose(waited, [1, 2, 3, 3], rtol=1e-3)


def test_no_try_begins_after_the_budget():
    with pytest.raises(InputError, match="gave up after 3 tries in 3 s"):
        run([BUSY] * 9, Backoff(tries=9, first=1, longest=60, budget=4))


def test_an_error_of_ours_is_not_repeated():
    with pytest.raises(ZeroDivisionError):
        run([ZeroDivisionError("x")], Backoff())


def test_a_store_on_disk_fails_at_once(tmp_path, waits):
    with pytest.raises(InputError, match="cannot open"):
        _ = SomaStore(str(tmp_path / "nothing")).shape
    assert waits == []


@pytest.mark.parametrize(
    "endpoint", ["minio.lab:9000", "ftp://x", "https://u:p@host", "https://host/bucket", "http://"]
)
def test_an_endpoint_is_an_address_of_a_server(endpoint):
    with pytest.raises(ValueError, match="no address of a server"):
        S3Config(endpoint=endpoint)


def test_settings_of_s3_need_an_s3_address(tmp_path):
    source = {"type": "soma", "uri": "/data/exp", "s3": {"max_parallel": 2}}
    with pytest.raises(InputError, match="region, anonymous and s3 are for s3:// addresses"):
        open_source(IngestConfig.model_validate({"source": source}), tmp_path, [])


def test_a_message_that_is_not_from_s3_is_other():
    assert failure(RuntimeError("S3: [HTTP Response Code: 429] ")).kind == "busy"
    assert failure(ValueError("")).kind == failure(RuntimeError("shape (3, 503)")).kind == "other"


# ---- identity ----------------------------------------------------------------------------------------------------
def soma_source(uri: str, proxy: FaultyProxy | None = None, **settings) -> IngestConfig:
    if proxy is not None:
        settings["s3"] = {"endpoint": proxy.address, "addressing": "path", "tries": 1}
    return IngestConfig.model_validate({"source": {"type": "soma", "uri": uri, **settings}})


def test_a_copy_in_the_store_is_the_same_input_as_the_experiment_on_disk(local, proxy):
    there = input_contents(soma_source("s3://cells/exp", proxy, region=REGION))["source"]
    here = input_contents(soma_source(local.uri))["source"]
    assert there.digest == here.digest
    assert {"obs", "ms/RNA/var", "ms/RNA/X/raw"} == set(there.files)
    assert input_contents(soma_source("s3://public/exp", proxy, region=REGION, anonymous=True))["source"] == replace(
        there, value="s3://public/exp", changed_at=ANY
    )


def test_a_store_that_cannot_be_listed_is_explained():
    config = soma_source(
        "s3://cells/exp", region=REGION, s3={"endpoint": f"http://127.0.0.1:{free_port()}", "tries": 1}
    )
    with pytest.raises(InputError, match=r"ingest.source.uri: s3://cells/exp: cannot be read"):
        input_contents(config, where="ingest.")
