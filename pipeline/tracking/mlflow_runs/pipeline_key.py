"""The name that ties a pipeline's folder to its runs in MLflow, wherever the folder is moved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.core.files import write_json_atomic

RECORD = ".mlflow_pipeline.json"


def pipeline_key(folder: Path, *, local: bool) -> str:
    """Return the key of a pipeline; it does not change when the folder is moved.

    A copy beside its original gets a key of its own, since both would write into the same runs. With a database in the
    output folder it keeps the key: it has a copy of the runs too.

    Args:
        folder: The pipeline's folder, which need not exist.
        local: Whether the runs are in a database in the output folder.
    """
    recorded = _read(folder)
    if recorded is not None:
        former = Path(recorded["folder"])
        if local or former == folder or not _is_another(former, folder, recorded["key"]):
            return str(recorded["key"])
    return f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"


def record_key(folder: Path, key: str) -> None:
    """Keep a key in the pipeline's folder, if that exists.

    Raises:
        OSError: The folder cannot be written.
    """
    record = {"key": key, "folder": str(folder)}
    if folder.is_dir() and _read(folder) != record:
        write_json_atomic(folder / RECORD, record)


def _is_another(former: Path, folder: Path, key: str) -> bool:
    """Return whether a folder other than this one still has the key."""
    recorded = _read(former)
    return recorded is not None and recorded["key"] == key and not former.samefile(folder)


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / RECORD).read_text())
        return {"key": str(found["key"]), "folder": str(found["folder"])}
    except (OSError, ValueError, TypeError, KeyError):
        return None
