"""Each check of `scldm doctor`, well and broken: servers are real ones on the loopback address."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.cli.doctor import machine as doctor
from pipeline.cli.doctor import network as doctor_network
from pipeline.cli.doctor import report as doctor_report
from pipeline.cli.doctor.finding import Requirements
from pipeline.cli.doctor.report import examine, report

TOKEN = "t0ken"


@pytest.fixture
def requirements(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return Requirements(output=tmp_path / "runs", census=False)


@pytest.fixture
def server():
    """Answers as told: `serve(status, skew, needs_token)` gives an address."""
    started = []

    def serve(status=200, *, skew=0.0, needs_token=False):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                refused = needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}"
                self.send_response_only(401 if refused else status)
                self.send_header("Date", formatdate(time.time() - skew, usegmt=True))
                self.end_headers()

            def log_message(self, *_):
                pass

        s = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=s.serve_forever, daemon=True).start()
        started.append(s)
        return f"http://127.0.0.1:{s.server_port}"

    yield serve
    for s in started:
        s.shutdown()


def test_a_well_machine_is_well(requirements):
    text, code = report(examine(requirements), as_json=False)
    assert code == 0, text
    assert not list(requirements.output.iterdir()), "a check left something behind"


def test_another_version_is_named_with_the_tested_one(requirements, tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text("\n".join(f"{name}==0.0.1" for name in doctor.COMPARED))
    found = doctor.versions(requirements, pins)
    assert found.status == "fail"
    assert "(tested: 0.0.1)" in found.message
    assert str(pins) in found.fix


def test_gpus_that_a_job_asks_for_and_nobody_has_fail(requirements, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert doctor.gpus(replace(requirements, gpus=True)).status == "fail"
    assert doctor.gpus(requirements).status == "ok"
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert "CUDA build" in doctor.gpus(requirements).fix


def test_a_place_that_takes_no_files_fails_and_says_what_output_must_be(requirements, tmp_path):
    (tmp_path / "file").write_text("")
    found = doctor.storage(replace(requirements, output=tmp_path / "file" / "runs"))
    assert found.status == "fail"
    assert "output=/shared/runs" in found.fix


def test_a_full_disk_fails(requirements, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_FREE", 1e18)
    assert doctor.disk(requirements).status == "fail"


@pytest.mark.parametrize(
    ("status", "fix"), [(200, ""), (401, "MLFLOW_TRACKING_USERNAME"), (403, "--allowed-hosts"), (500, "its log")]
)
def test_what_mlflow_answers_is_explained(requirements, server, status, fix):
    found = doctor_network.mlflow(replace(requirements, tracking=server(status)))
    assert (found.status == "ok") == (status == 200)
    assert fix in found.fix


def test_an_mlflow_that_is_down_and_a_broken_file_fail(requirements, tmp_path):
    assert doctor_network.mlflow(replace(requirements, tracking="http://127.0.0.1:9")).status == "fail"
    (tmp_path / "bad.db").write_text("no database at all, but longer than a header of SQLite" * 30)
    assert doctor_network.mlflow(replace(requirements, tracking=f"sqlite:///{tmp_path}/bad.db")).status == "fail"
    with sqlite3.connect(tmp_path / "good.db") as database:
        database.execute("create table runs (id text)")
    assert "0 runs" in doctor_network.mlflow(replace(requirements, tracking=f"sqlite:///{tmp_path}/good.db")).message


def test_a_cluster_that_takes_jobs_from_anybody_fails(requirements, server):
    found = doctor_network.token(replace(requirements, address=server(200)))
    assert found.status == "fail"
    assert "from anybody" in found.message


def test_the_clusters_token_is_ours_or_it_fails(requirements, server, monkeypatch):
    address = server(200, needs_token=True)
    assert "does not take our token" in doctor_network.token(replace(requirements, address=address)).message
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert doctor_network.token(replace(requirements, address=address)).status == "ok"


def test_a_token_that_others_can_read_fails(requirements, tmp_path):
    path = tmp_path / "home" / ".ray" / "auth_token"
    path.parent.mkdir(parents=True)
    path.write_text(TOKEN)
    path.chmod(0o644)
    found = doctor_network.token(requirements)
    assert found.fix == f"chmod 600 {path}"
    path.chmod(0o600)
    assert doctor_network.token(requirements).status == "ok"


@pytest.mark.parametrize(("skew", "status"), [(0, "ok"), (3600, "fail"), (-3600, "fail")])
def test_a_clock_that_is_wrong_is_noticed(requirements, server, skew, status):
    assert doctor_network.clocks(replace(requirements, address=server(401, skew=skew))).status == status


def test_the_census_is_asked_only_where_it_is_read(requirements, server, monkeypatch):
    assert doctor_network.census(requirements).status == "skip"
    monkeypatch.setattr(doctor_network, "CENSUS", server(200))
    assert doctor_network.census(replace(requirements, census=True)).status == "ok"
    monkeypatch.setattr(doctor_network, "CENSUS", "http://127.0.0.1:9")
    assert doctor_network.census(replace(requirements, census=True)).status == "fail"


def test_a_check_that_breaks_does_not_hide_the_others(requirements, monkeypatch):
    monkeypatch.setattr(doctor_report, "disk", lambda _: 1 / 0)
    found = {f.check: f for f in examine(requirements)}
    assert "ZeroDivisionError" in found["<lambda>"].message
    assert found["storage"].status == "ok"


def test_the_command_fails_if_one_check_does_and_speaks_json(requirements, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor_network, "CENSUS", "http://127.0.0.1:9")
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    found = {f["check"]: f for f in json.loads(result.output)["findings"]}
    assert found["census"]["status"] == "fail"
    assert found["census"]["mend"]
