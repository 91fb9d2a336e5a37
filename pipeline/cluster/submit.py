"""Submit jobs to a Ray cluster, follow, list and stop them, through nothing but Ray's job server (HTTP).

A job gets the code under `working_dir` without EXCLUDES, and no environment: credentials belong to the cluster's
machines (an instance's role, a pod's account), never to a job.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.logs import STOPPED
from scldm.errors import InputError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Seconds between SIGTERM and SIGKILL when a job is stopped: Ray's 3 are too few to write a checkpoint. Read by the
# job's supervisor in its environment: from cluster/env.sh, or from what `submit` sends.
STOP_WAIT_SECONDS = 600
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOPPED_BY_SIGNAL = 143
FINAL = ("SUCCEEDED", "FAILED", "STOPPED")
# Code goes to the cluster; data, outputs and secrets do not. .gitignore is respected as well, and .rayignore says the
# same to `ray job submit --working-dir .` (a test holds them equal).
# Patterns with a leading slash mean the top folder only: pipeline/data is code.
EXCLUDES = (
    *(".git", ".venv", "venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", "docs/_build"),
    *("/data", "/shared", "/runs", "/mlruns", "/mlartifacts", "mlflow.db"),
    *("*.h5ad", "*.h5", "*.zarr", "*.soma", "*.safetensors", "*.ckpt", "*.pt", "*.whl"),
    *(".env", ".env.*", "*.pem", "*.key", ".aws", ".ssh", ".netrc", "auth_token"),
)


@contextmanager
def client(address: str | None) -> Iterator[Any]:
    """Open Ray's job client. Connection errors become InputErrors that tell how to fix them."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    if "RAY_AUTH_MODE" not in os.environ and has_token():  # sent along only in this mode, which is read once, at import
        os.environ["RAY_AUTH_MODE"] = "token"
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard", "ray._private"):  # every ignored file, every chunk of the upload
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise InputError(explain(address, error)) from error


def has_token() -> bool:
    """Return whether this machine holds a token, in any of the places where Ray searches for one."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return (Path.home() / ".ray" / "auth_token").is_file()


def explain(address: str, error: Exception) -> str:
    """Return what an error of the job server means and how to fix it."""
    text = str(error)
    if "authentication token" in text.lower() or "401" in text or "403" in text:
        return (
            f"{address} needs a token, and {'refused the one of' if has_token() else 'there is none on'} this machine: "
            "put the cluster's into ~/.ray/auth_token (mode 600), or its path into RAY_AUTH_TOKEN_PATH"
        )
    if "does not exist" in text:
        return f"{address}: {next(line for line in text.splitlines() if 'does not exist' in line)}; see scldm status"
    first = (text.splitlines() or ["no message"])[0]
    return (
        f"no working Ray job server at {address}: start one (scldm cluster start), forward its port (ray attach "
        f"cluster/aws.yaml --port-forward 8265), or give --address. {first}"
    )


# ---- sending -----------------------------------------------------------------------------------------------------
def submit(
    job_file: Path,
    overrides: Sequence[str],
    *,
    kind: str,
    name: str,
    address: str | None,
    working_dir: Path,
    wait: bool,
) -> int:
    """Send a job to a cluster, follow its log, and return its exit code.

    Args:
        overrides: Settings to change, `key.path=value`.
        kind: Kind of the job, shown by `status`, as is its name.
        working_dir: Code that is sent; the job file must be in it.
        wait: Follow the log; otherwise return 0 once the job is submitted.
    """
    working_dir = working_dir.resolve()
    if not job_file.resolve().is_relative_to(working_dir):
        raise InputError(f"{job_file} is not under --working-dir {working_dir}, which is all that the cluster gets")
    command = ["python", "-m", "pipeline", "run", str(job_file.resolve().relative_to(working_dir)), *overrides]
    submission_id = f"scldm-{kind}-{name}-{uuid.uuid4().hex[:6]}"
    with client(address) as jobs:
        jobs.submit_job(
            entrypoint=shlex.join(command),
            submission_id=submission_id,
            runtime_env={
                "working_dir": str(working_dir),
                "excludes": list(EXCLUDES),
                "env_vars": {STOP_WAIT: str(STOP_WAIT_SECONDS)},
            },
            metadata={"scldm.kind": kind, "scldm.name": name},
        )
        print(f"submitted {submission_id}: {shlex.join(command)}", flush=True)
        print(f"  follow: scldm logs -f {submission_id}    stop: scldm stop {submission_id}", flush=True)
        if not wait:
            return 0
        try:
            return follow(jobs, submission_id)
        except KeyboardInterrupt:
            print(f"\nno longer followed; the job continues. To stop it: scldm stop {submission_id}", flush=True)
            return 130


def follow(jobs: Any, submission_id: str) -> int:
    """Print a job's log until it ends, and return its exit code."""

    async def tail() -> None:
        async for lines in jobs.tail_job_logs(submission_id):
            print(lines, end="", flush=True)

    asyncio.run(tail())
    return exit_code(wait_for_end(jobs, submission_id), submission_id)


def wait_for_end(jobs: Any, submission_id: str, seconds: float | None = None) -> Any:
    """Return Ray's information about a job once it has ended, or about the running job after `seconds`."""
    until = time.monotonic() + (seconds if seconds is not None else float("inf"))
    while str((info := jobs.get_job_info(submission_id)).status.value) not in FINAL and time.monotonic() < until:
        time.sleep(1)
    return info


def exit_code(info: Any, submission_id: str) -> int:
    """Return the driver's exit code, or 143 as in a shell if the job was stopped."""
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if info.status.value == "SUCCEEDED":
        return 0
    print(f"{submission_id}: {info.status.value}: {info.message}", flush=True)
    return STOPPED_BY_SIGNAL if info.status.value == "STOPPED" else 1


# ---- listing and stopping ------------------------------------------------------------------------------------------
def status(submission_id: str | None, address: str | None) -> str:
    """Return a table of all jobs, newest last, or of one job with its message."""
    with client(address) as jobs:
        if submission_id is not None:
            info = jobs.get_job_info(submission_id)
            return f"{_table([info])}\n{info.entrypoint}\n{info.message or ''}".rstrip()
        found = sorted((j for j in jobs.list_jobs() if j.submission_id), key=lambda j: j.start_time or 0)
        return _table(found) if found else "no job was sent to this cluster"


def logs(submission_id: str | None, address: str | None, *, wait: bool) -> int:
    """Print the log of a job, by default the newest; with `wait` until it ends. Returns its exit code, or 0."""
    with client(address) as jobs:
        submission_id = submission_id or _newest(jobs)
        if wait:
            return follow(jobs, submission_id)
        print(jobs.get_job_logs(submission_id), end="", flush=True)
        return 0


def stop(submission_id: str, address: str | None, *, seconds: float) -> str:
    """Stop a job and wait until it has ended; training writes a checkpoint first."""
    with client(address) as jobs:
        if (info := jobs.get_job_info(submission_id)).status.value in FINAL:
            return f"{submission_id}: {info.status.value} already"
        jobs.stop_job(submission_id)
        info = wait_for_end(jobs, submission_id, seconds)
        if info.status.value not in FINAL:
            return f"{submission_id}: {info.status.value} after {seconds:.0f} s; the stop was requested: scldm status"
        stopped = [line for line in jobs.get_job_logs(submission_id).splitlines() if STOPPED in line]
        return "\n".join([f"{submission_id}: {info.status.value}; the same command continues", *stopped[-1:]])


def _newest(jobs: Any) -> str:
    found = [j for j in jobs.list_jobs() if j.submission_id]
    if not found:
        raise InputError("no job was sent to this cluster: scldm submit JOB")
    return str(max(found, key=lambda j: j.start_time or 0).submission_id)


def _table(jobs: Sequence[Any]) -> str:
    from pipeline.core.text import table

    rows = [("job", "status", "kind", "name", "started", "took")]
    for job in jobs:
        meta = job.metadata or {}
        given = (meta.get("scldm.kind", ""), meta.get("scldm.name", ""))
        rows.append((job.submission_id, job.status.value, *given, *_times(job)))
    return table(rows)


def _times(job: Any) -> tuple[str, str]:
    """Return when a job started and how long it took; a job that failed before it started has neither."""
    if not job.start_time:
        return "not started", ""
    started = datetime.fromtimestamp(job.start_time / 1000, UTC)
    ended = (job.end_time or time.time() * 1000) / 1000
    return f"{started:%Y-%m-%d %H:%M} UTC", f"{ended - started.timestamp():.0f} s"
