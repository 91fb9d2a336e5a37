"""A real head behind a token: jobs are sent with Ray's own command and ours, stopped, sent again, and leak nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.core.manifest import newest_manifest
from pipeline.training.checkpoints.manifest import committed

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
STEPS = 900
CANARY = f"canary-{uuid.uuid4().hex}"  # not the same in this file, which goes along in a package
JOB = {
    "kind": "train_vae",
    "name": "tiny",
    "resources": {"workers": 1, "cpus_per_worker": 1, "actors": 1},
    "ingest": {"source": {"type": "synthetic", "n_cells": 300, "n_genes": 80, "n_types": 3}},
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_heads_cross": 2, "n_latent_tokens": 4, "latent_width": 4},
    "train": {"max_steps": STEPS, "checkpoint_every": 10_000, "validate_every": 10_000, "validation_cells": 32,
              "log_every_seconds": 1.0, "feed": {"batch_size": 32, "micro_batch_size": 16, "lanes": 4}},
}  # fmt: skip
EVALUATE = {"kind": "evaluate", "name": "never-made"}


class Head:
    """`scldm cluster start` in a home, a folder of jobs and a temporary folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.port, self.dashboard = folder, free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.dashboard}"
        (folder / "home").mkdir()
        self.file("train.yaml", JOB)
        self.file("evaluate.yaml", EVALUATE)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "SCLDM_"))}
        self.env = {
            **clean, "HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "AWS_SECRET_ACCESS_KEY": f"{CANARY}-aws", "MLFLOW_TRACKING_PASSWORD": f"{CANARY}-mlflow",
        }  # fmt: skip
        started = self.scldm(
            "cluster", "start", f"--root={folder}", f"--port={self.port}", f"--dashboard-port={self.dashboard}",
            f"--temp-dir={folder / 'ray'}", "--num-cpus=3", "--object-store-memory=100000000",
            "--min-worker-port=0", "--max-worker-port=0",
        )  # fmt: skip
        assert started.returncode == 0, started.stdout + started.stderr
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": self.address}
        self.pid = json.loads((folder / "home/.scldm/cluster.json").read_text())["pid"]

    def file(self, name: str, job: dict) -> None:
        path = self.folder / "jobs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/usr/bin/env -S python -m pipeline run\n" + yaml.safe_dump(job))
        path.chmod(0o755)

    def scldm(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        return self.call([sys.executable, "-m", "pipeline", *arguments], **options)

    def ray(self, *arguments: str) -> subprocess.CompletedProcess:
        """From a folder that is not the head's: paths of job files are those of the cluster."""
        return self.call([sys.executable, "-m", "ray.scripts.scripts", *arguments], cwd=self.folder / "home")

    def call(self, command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, env=self.env, cwd=cwd or self.folder, capture_output=True, text=True, timeout=400
        )

    def token(self) -> str:
        return (self.folder / "home/.ray/auth_token").read_text().strip()

    def post(self, headers: dict[str, str]) -> int:
        request = urllib.request.Request(f"{self.address}/api/jobs/", data=b'{"entrypoint": "id"}', headers=headers)
        try:
            return urllib.request.urlopen(request, timeout=20).status
        except urllib.error.HTTPError as error:
            return error.code

    def info(self, submission: str) -> dict:
        headers = {"Authorization": f"Bearer {self.token()}"}
        request = urllib.request.Request(f"{self.address}/api/jobs/{submission}", headers=headers)
        return json.load(urllib.request.urlopen(request, timeout=20))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))  # Ray's sockets lie in it: a path of pytest's is too long
    try:
        head = Head(folder)
        yield head
        head.scldm("cluster", "stop", "--force")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def steps_in(log: str) -> list[int]:
    return [int(n) for n in re.findall(r"^[\d:]{8} train_vae step (\d+)/", log, re.M)]


@pytest.fixture(scope="module")
def stopped(head) -> tuple[int, str]:
    """The job, sent and stopped in its first steps: the step that it said, and what `stop` said."""
    sent = head.ray("job", "submit", "--no-wait", "--submission-id", "first", "jobs/train.yaml")
    assert sent.returncode == 0, sent.stderr
    until = time.monotonic() + 300
    while not any(steps_in(log := head.scldm("logs", "first").stdout)):
        assert time.monotonic() < until, log
        assert head.info("first")["status"] in ("PENDING", "RUNNING"), log
        time.sleep(1)
    said = head.scldm("stop", "first").stdout
    found = re.search(r"resumes after step (\d+)", said)
    assert found, said + head.scldm("logs", "first").stdout
    return int(found[1]), said


@pytest.mark.row("S2")
def test_strangers_send_nothing(head):
    assert head.post({}) == 401
    assert head.post({"Authorization": "Bearer guessed"}) == 403
    assert oct((head.folder / "home/.ray/auth_token").stat().st_mode & 0o777) == "0o600"


def test_a_second_head_is_refused(head):
    second = head.scldm("cluster", "start", f"--port={free_port()}", f"--dashboard-port={free_port()}")
    assert second.returncode == 2
    assert "a Ray head is already running" in second.stderr


@pytest.mark.row("T6")
def test_stop_leaves_a_checkpoint_at_the_very_step(head, stopped):
    step, said = stopped
    assert 0 < step < STEPS
    assert "STOPPED" in said
    stage = head.folder / "runs/tiny/train_vae"
    found = [c.position.step for f in stage.glob("*/checkpoints") for c in committed(f)]
    assert found == [step]
    assert newest_manifest(head.folder / "runs/tiny", "train_vae") is None


@pytest.mark.row("T6")
def test_the_same_command_goes_on_and_ends_with_0(head, stopped):
    step, _ = stopped
    again = head.ray("job", "submit", "--submission-id", "second", "jobs/train.yaml")
    assert again.returncode == 0, again.stdout[-3000:]
    later = steps_in(again.stdout)
    assert later
    assert min(later) >= step, "it began from the beginning"
    assert newest_manifest(head.folder / "runs/tiny", "train_vae").facts["steps"] == STEPS


def test_an_exit_code_reaches_the_shell(head):
    """Ray's command knows 0 and 1; ours gives the job's own. The code goes along in a package."""
    ray = head.ray("job", "submit", "--submission-id", "bad", "jobs/evaluate.yaml")
    assert ray.returncode == 1
    assert head.info("bad")["driver_exit_code"] == 2
    assert "ingest" in ray.stdout, "what is missing does not show in the log"
    ours = head.scldm("submit", "jobs/evaluate.yaml", "name=never", cwd=ROOT)
    assert ours.returncode == 2, ours.stdout + ours.stderr
    assert re.search(r"submitted scldm-evaluate-never-\w{6}: python -m pipeline run jobs/evaluate.yaml", ours.stdout)
    table = head.scldm("status").stdout
    assert re.search(r"scldm-evaluate-never-\w+ +FAILED +evaluate +never", table), table


def test_no_secret_is_in_any_file_or_answer(head, stopped):
    """Whatever Ray, MLflow and we wrote; the token too."""
    secrets = [CANARY.encode(), head.token().encode()]
    looked_at = 0
    for path in [
        *(head.folder / "ray").rglob("*"),
        *(head.folder / "runs").rglob("*"),
        *(head.folder / "home").rglob("*"),
    ]:
        if path.is_symlink() or not path.is_file() or path.name == "auth_token":
            continue
        content = path.read_bytes()
        looked_at += 1
        assert not any(s in content for s in secrets), path
    assert looked_at > 50
    names = {p.name for p in (head.folder / "runs").rglob("*")}
    assert {"mlflow.db", "config.yaml"} <= names
    assert not any(s.decode() in json.dumps(head.info("first")) for s in secrets)


def test_the_end_of_the_head_is_the_end_of_all_that_it_started_and_of_nothing_else(head, stopped):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        assert len(family) > 5
        said = head.scldm("cluster", "stop")
        assert said.returncode == 0, said.stderr
        _, left = psutil.wait_procs(family, timeout=20)
        assert left == []
        assert bystander.poll() is None
        assert "no head runs" in head.scldm("cluster", "stop").stdout
    finally:
        bystander.kill()
        bystander.wait()
