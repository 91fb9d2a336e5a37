"""MLflow's client with short timeouts, keys in MLflow's alphabet, and explanations of its errors."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scldm.errors import InputError

EXPLANATIONS = {  # by HTTP status
    401: "user or password are refused: export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    403: "access is refused: the user may not write there, or the server was started without --allowed-hosts",
    404: "no such run or experiment: it was deleted permanently, or this is the address of another server",
    429: "too many requests",
}


def mlflow_client(uri: str) -> Any:
    """Return a client that gives up early: what it cannot send is replayed from disk later."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def chosen_uri(given: str | None, near: Path | None = None) -> str:
    """Return the store that a command uses: its option, MLFLOW_TRACKING_URI, or mlflow.db next to a pipeline's folder.

    Raises:
        InputError: None of them is given.
    """
    if found := given or os.environ.get("MLFLOW_TRACKING_URI"):
        return found
    places = [Path.cwd() / "runs"] if near is None else [near.absolute(), *near.absolute().parents][:4]
    for place in places:
        if (place / "mlflow.db").is_file():
            return f"sqlite:///{place / 'mlflow.db'}"
    looked = ", ".join(str(p / "mlflow.db") for p in places)
    raise InputError(
        f"no MLflow store: give --uri, export MLFLOW_TRACKING_URI, or make a run first (looked for {looked})"
    )


@functools.lru_cache(4096)  # a training logs the same hundred names at every step
def clean_key(name: str) -> str:
    """Return a key in MLflow's alphabet, without empty path parts; at most 250 characters, different for long names."""
    parts = [re.sub(r"[^\w\-.: ]", "_", part) for part in name.split("/")]
    key = "/".join(part for part in parts if part.strip(" .")) or "_"
    return key if len(key) <= 250 else f"{key[:239]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def clean_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values under clean keys. Two names with one clean key, such as `CD4+` and `CD4?`, differ by a hash."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = clean_key(name)
        if key in found:
            key = f"{key[:239]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"
        found[key] = value
    return found


def clean_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """Return the finite values under clean keys."""
    return clean_keys({k: float(v) for k, v in values.items() if math.isfinite(v)})


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of the client; None if there is none."""
    for link in _chain(error):
        if found := re.search(r"error code (\d{3})|(\d{3}) (?:Client|Server) Error|too many (\d{3}) error", str(link)):
            return int(next(g for g in found.groups() if g))
    code = getattr(error, "error_code", None)
    return {"RESOURCE_DOES_NOT_EXIST": 404, "PERMISSION_DENIED": 403, "UNAUTHENTICATED": 401}.get(str(code))


def explain(error: BaseException, uri: str) -> str:
    """Return one line: what happened, and how to fix it."""
    text = (str(error).splitlines() or [""])[0][:160] or type(error).__name__
    status = status_of(error)
    if isinstance(error, InputError):  # of ours, with its own remedy
        message = str(error)
    elif "active' state" in text or "deleted" in text:
        message = (
            "its run was deleted; `mlflow runs restore --run-id …`, or remove tracking.json from the stage's folder to "
            "start another run"
        )
    elif status in EXPLANATIONS:
        message = EXPLANATIONS[status]
    elif "Connection refused" in str(error) or "Max retries" in str(error) or "timed out" in str(error):
        message = "no answer"
    else:
        message = text
    return (
        f"{without_login(uri)}: {message}. Training continues; `scldm mlflow sync` completes the run later, "
        "`scldm doctor` checks the server"
    )


def without_login(uri: str) -> str:
    """Return the address of a server without the user name and password that it may hold."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if uri.startswith("http") else uri


def restore_command(uri: str, experiment_id: str) -> str:
    """Return the command that brings back a deleted experiment of a store."""
    store = shlex.quote(without_login(uri))
    return f"MLFLOW_TRACKING_URI={store} mlflow experiments restore --experiment-id {experiment_id}"


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
