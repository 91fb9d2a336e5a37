"""One MLflow server for all tests of its faults."""

from __future__ import annotations

import signal

import pytest
from helpers.servers.mlflow_server import Proxy, Server

from pipeline.tracking import tracker as tracking


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    import mlflow  # noqa: F401  (now, because to import it takes every thread's time for seconds)

    made = Server(tmp_path_factory.mktemp("mlflow"))
    made.start()
    yield made
    made.signal(signal.SIGCONT)
    made.kill()


@pytest.fixture
def proxy(server):
    made = Proxy(server)
    yield made
    made.close()


@pytest.fixture
def patience(monkeypatch):
    """Retry sooner than in production, and wait longer for an answer, because tests share their machine."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 60.0)
    monkeypatch.setattr(tracking, "WORKER_RETRY_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "DRIVER_RETRY_SECONDS", 0.2)


@pytest.fixture
def impatient(patience, monkeypatch):
    """Give up soon, for servers that do not answer. Returns the seconds that `close` may take."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 3.0)
    return 3.0
