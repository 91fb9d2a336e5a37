"""What is sent to a cluster and what is not, and the message if none answers. No Ray is started here."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.cluster import submit as submitting
from scldm.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
CODE = ("pipeline/cli/app.py", "pipeline/data/soma/store.py", "jobs/demo.yaml", "scldm/nn/vae.py", "cluster/env.sh")
KEPT_BACK = (
    *(".env", ".env.production", "deploy.pem", "host.key", ".aws/credentials", ".ssh/id_ed25519", ".netrc"),
    *(
        "data/cells.csv",
        "runs/demo/train_vae/1/checkpoints/step/x.bin",
        "mlruns/0/meta.yaml",
        "mlflow.db",
        "cells.h5ad",
    ),
    *(".git/config", ".venv/bin/python", "models/vae/model.safetensors", "jobs/.env", ".ray/auth_token"),
)


@pytest.fixture
def folder(tmp_path):
    for name in (*CODE, *KEPT_BACK):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("canary" if name in KEPT_BACK else "code")
    return tmp_path


def packed(folder: Path, excludes: list[str], out: Path) -> dict[str, str]:
    """As Ray packs a working directory."""
    from ray._private.runtime_env.packaging import create_package

    create_package(str(folder), out, excludes=excludes, include_gitignore=True)
    with zipfile.ZipFile(out) as z:
        return {n: z.read(n).decode() for n in z.namelist() if not n.endswith("/")}


@pytest.mark.row("S6")
def test_code_goes_along_and_data_outputs_and_secrets_do_not(folder, tmp_path_factory):
    sent = packed(folder, list(submitting.EXCLUDES), tmp_path_factory.mktemp("out") / "package.zip")
    assert set(sent) == set(CODE)


@pytest.mark.row("S6")
def test_rays_own_command_leaves_the_same_behind(folder, tmp_path_factory):
    """`ray job submit --working-dir .` takes no list from us, but reads .rayignore."""
    (folder / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    sent = packed(folder, [], tmp_path_factory.mktemp("out") / "package.zip")
    assert set(sent) - {".rayignore"} == set(CODE)
    listed = [line for line in (ROOT / ".rayignore").read_text().splitlines() if not line.startswith("#")]
    assert tuple(listed) == submitting.EXCLUDES


def test_a_job_outside_what_is_sent_is_refused(tmp_path):
    options = {"kind": "pipeline", "name": "x", "address": None, "wait": False}
    with pytest.raises(InputError, match="not under --working-dir"):
        submitting.submit(Path("/elsewhere/job.yaml"), [], working_dir=tmp_path, **options)


class FakeJobs:
    """Remembers what it was sent."""

    def submit_job(self, **what):
        self.sent = what


@pytest.fixture
def fake(monkeypatch):
    from contextlib import nullcontext

    jobs = FakeJobs()
    monkeypatch.setattr(submitting, "client", lambda address: nullcontext(jobs))
    return jobs


@pytest.mark.row("S5")
def test_a_job_is_sent_with_a_name_one_can_read_and_time_to_stop_and_no_environment(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary")
    job = tmp_path / "job file.yaml"
    options = {"kind": "train_vae", "name": "demo", "address": None, "wait": False}
    assert submitting.submit(job, ["a.b=1; rm -rf /"], working_dir=tmp_path, **options) == 0
    assert fake.sent["submission_id"].startswith("scldm-train_vae-demo-")
    assert fake.sent["entrypoint"] == "python -m pipeline run 'job file.yaml' 'a.b=1; rm -rf /'"
    assert fake.sent["metadata"] == {"scldm.kind": "train_vae", "scldm.name": "demo"}
    assert fake.sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
    assert "canary" not in repr(fake.sent)


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 143), ("SUCCEEDED", None, 0)],
)
def test_the_exit_code_is_the_jobs(status, driver, code):
    info = SimpleNamespace(driver_exit_code=driver, status=SimpleNamespace(value=status), message="why")
    assert submitting.exit_code(info, "id") == code


def test_the_message_without_a_cluster_tells_how_to_start_one(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with (
        pytest.raises(InputError, match=r"127\.0\.0\.1:9: start one \(scldm cluster start\)"),
        submitting.client("http://127.0.0.1:9"),
    ):
        pass


def test_the_message_about_a_missing_token_tells_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    message = submitting.explain("http://head:8265", RuntimeError("status code 401: Unauthorized"))
    assert "needs a token" in message
    assert "there is none" in message
    assert "~/.ray/auth_token" in message


def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path):
    from pipeline.config.io.loader import load_job

    with pytest.raises(InputError) as error:
        load_job(ROOT / "jobs" / "demo.yaml", ["tracking.uri=postgresql://me:hunter2@db/mlflow"])
    assert "MLFLOW_TRACKING_PASSWORD" in str(error.value)
    assert "hunter2" not in str(error.value)


def test_a_clusters_mlflow_is_used_if_the_job_names_none(tmp_path, monkeypatch):
    from pipeline.config.io.loader import load_job
    from pipeline.tracking.tracker import Tracking

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://head:5000")
    job = load_job(ROOT / "jobs" / "demo.yaml")
    assert Tracking(job, tmp_path, "job.yaml").uri == "http://head:5000"
    named = load_job(ROOT / "jobs" / "demo.yaml", ["tracking.uri=http://lab:5000"])
    assert Tracking(named, tmp_path, "job.yaml").uri == "http://lab:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert Tracking(job, tmp_path, "job.yaml").uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_job_that_failed_before_it_started_has_no_date():
    given = {"submission_id": "raysubmit_1", "status": SimpleNamespace(value="FAILED"), "metadata": None}
    table = submitting._table([SimpleNamespace(start_time=None, end_time=1_700_000_000_000, **given)])
    assert "not started" in table
    assert "1970" not in table
    table = submitting._table([SimpleNamespace(start_time=1_700_000_000_000, end_time=1_700_000_007_000, **given)])
    assert "2023-11-14 22:13 UTC" in table
    assert "7 s" in table
