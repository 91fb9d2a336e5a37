"""Checks of `scldm doctor` that contact servers: MLflow, the Census, the cluster's job server, clocks.

None waits longer than TIMEOUT.
"""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from pipeline.cli.doctor.finding import TIMEOUT, Finding, Requirements
from pipeline.cluster.submit import has_token
from pipeline.tracking.mlflow_runs.client import restore_command, without_login

CENSUS = "https://cellxgene-census-public-us-west-2.s3.us-west-2.amazonaws.com/cell-census/"
MOST_READ = 1 << 16  # bytes of an answer
MOST_SKEW = 60.0  # seconds. S3 refuses signatures at 900; logs of several nodes are hard to read long before


@dataclass(frozen=True)
class Answer:
    """The answer of a server: its status code and clock, or the reason why there is none."""

    code: int | None
    date: float | None = None
    reason: str = ""
    body: str = ""


def ask(url: str, headers: dict[str, str] | None = None) -> Answer:
    """Send a GET request and wait at most TIMEOUT; an error status is an answer too."""
    request = urllib.request.Request(url, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            body = response.read(MOST_READ).decode("utf-8", "replace")
            return Answer(response.status, _date(response.headers.get("Date")), body=body)
    except urllib.error.HTTPError as error:
        return Answer(error.code, _date(error.headers.get("Date")))
    except (OSError, ValueError) as error:
        return Answer(None, reason=str(getattr(error, "reason", error)))


def _date(text: str | None) -> float | None:
    return parsedate_to_datetime(text).timestamp() if text else None


def mlflow(requirements: Requirements) -> Finding:
    if requirements.tracking is None or requirements.tracking.startswith("sqlite:///"):
        path = Path((requirements.tracking or "").removeprefix("sqlite:///") or requirements.output / "mlflow.db")
        return _mlflow_file(path, requirements.experiment)
    if not requirements.tracking.startswith("http"):
        return Finding(
            "mlflow", "skip", f"{requirements.tracking} is neither a SQLite file nor a server: not looked at"
        )
    answer = ask(f"{requirements.tracking.rstrip('/')}/health", _login())
    if answer.code == 200:
        deleted = _deleted_on_server(requirements.tracking.rstrip("/"), requirements.experiment)
        return deleted or Finding("mlflow", "ok", f"{requirements.tracking} answers")
    fixes = {
        None: "start it (cluster/mlflow.sh, make ui), or unset tracking.uri: training continues and sends later",
        401: "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        403: "start the server with --allowed-hosts naming this address, as cluster/mlflow.sh does",
    }
    message = f"{requirements.tracking}: {answer.reason or f'status {answer.code}'}"
    return Finding("mlflow", "fail", message, fixes.get(answer.code, "its log says more"))


def _login() -> dict[str, str]:
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if not (user and password):
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def _mlflow_file(path: Path, experiment: str | None) -> Finding:
    if not path.exists():
        return Finding("mlflow", "ok", f"{path} will be made by the first job")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=TIMEOUT)) as database:
            (runs,) = database.execute("select count(*) from runs").fetchone()
            query = "select name, experiment_id from experiments where lifecycle_stage = 'deleted'"
            has_table = database.execute("select 1 from sqlite_master where name = 'experiments'").fetchone()
            deleted = dict(database.execute(query).fetchall()) if has_table else {}
    except sqlite3.Error as error:
        return Finding("mlflow", "fail", f"{path}: {error}", "move the file away: the next job makes a new one")
    for name, number in deleted.items():
        if name == experiment or (experiment is None and name.startswith("scldm/")):
            return _deleted(f"sqlite:///{path}", name, number)
    return Finding("mlflow", "ok", f"{path}, {runs} runs")


def _deleted_on_server(address: str, experiment: str | None) -> Finding | None:
    """Return a finding if the job's experiment was deleted; None if it was not, or the server does not say."""
    if experiment is None:
        return None
    query = urllib.parse.urlencode({"experiment_name": experiment})
    answer = ask(f"{address}/api/2.0/mlflow/experiments/get-by-name?{query}", _login())
    try:
        found = json.loads(answer.body)["experiment"]
    except (ValueError, KeyError, TypeError):
        return None
    return _deleted(address, experiment, found["experiment_id"]) if found["lifecycle_stage"] == "deleted" else None


def _deleted(uri: str, name: str, number: object) -> Finding:
    return Finding(
        "mlflow", "fail", f"experiment {name} of {without_login(uri)} was deleted: its runs take nothing",
        restore_command(uri, str(number)),
    )  # fmt: skip


def census(requirements: Requirements) -> Finding:
    if not requirements.census:
        return Finding("census", "skip", "the job does not read it")
    answer = ask(f"{CENSUS}?list-type=2&max-keys=1")
    if answer.code in (200, 403):  # any answer will do: listing may be forbidden
        return Finding("census", "ok", "the bucket answers (us-west-2)")
    fix = "a way out over https (NAT, proxy: HTTPS_PROXY); or another source. Only census jobs need it: name yours"
    return Finding("census", "fail", f"the bucket does not answer: {answer.reason or f'status {answer.code}'}", fix)


def token(requirements: Requirements) -> Finding:
    """Check that this machine's token is private and is the cluster's."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not os.environ.get("RAY_AUTH_TOKEN") and path.is_file() and path.stat().st_mode & 0o077:
        return Finding("token", "fail", f"{path} is readable by others", f"chmod 600 {path}")
    if requirements.address is None:
        message = "there is one" if has_token() else "none; scldm cluster start makes one"
        return Finding("token", "ok", f"{message}; no RAY_API_SERVER_ADDRESS to try it on")
    sent = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.is_file() else "")
    url = f"{requirements.address.rstrip('/')}/api/jobs/"
    bare = ask(url)
    if bare.code is None:
        fix = "scldm cluster start, or ray attach cluster/aws.yaml --port-forward 8265"
        return Finding("token", "fail", f"{requirements.address}: {bare.reason}", fix)
    if bare.code == 200:
        fix = "start it with RAY_AUTH_MODE=token (cluster/env.sh, scldm cluster start)"
        return Finding("token", "fail", f"{requirements.address} takes jobs from anybody", fix)
    if ask(url, {"Authorization": f"Bearer {sent}"}).code == 200:
        return Finding("token", "ok", f"{requirements.address} refuses strangers and takes ours")
    return Finding(
        "token", "fail", f"{requirements.address} does not take our token", "copy the cluster's to ~/.ray/auth_token"
    )


def clocks(requirements: Requirements) -> Finding:
    """Compare this clock with those of the servers that answer."""
    servers = {"the Census": CENSUS if requirements.census else None, "the job server": requirements.address}
    if requirements.tracking and requirements.tracking.startswith("http"):
        servers["MLflow"] = requirements.tracking
    skews = {}
    for name, url in servers.items():
        if url and (date := ask(url).date) is not None:
            skews[name] = time.time() - date
    if not skews:
        return Finding("clocks", "skip", "no server answers to compare with")
    message = ", ".join(f"{skew:+.0f} s from {name}" for name, skew in skews.items())
    if max(map(abs, skews.values())) > MOST_SKEW:
        return Finding("clocks", "fail", message, "turn on time synchronisation: timedatectl set-ntp true")
    return Finding("clocks", "ok", message)
