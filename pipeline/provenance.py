"""Where a result comes from: what code ran, and what its inputs were made of. Tags of MLflow runs."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.stage import Manifest

IDS = "tracking.json"


def lineage(inputs: Mapping[str, Manifest]) -> dict[str, str]:
    """Versions and run ids of what a stage was made from.

    The ids are read from the input's folder: a quick stage may write its manifest before its run exists.
    """
    tags = {}
    for stage, manifest in inputs.items():
        tags[f"scldm.{stage}_version"] = manifest.version
        if run_id := {**manifest.tracking, **read_ids(Path(manifest.folder))}.get("run_id"):
            tags[f"scldm.{stage}_run_id"] = str(run_id)
    return tags


def code_versions() -> dict[str, str]:
    """What code ran."""
    tags = {}
    for package in ("scldm", "ray", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            tags[f"scldm.{package}_version" if package != "scldm" else "scldm.code_version"] = version(package)
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=5)
        if sha.returncode == 0:
            tags |= {"scldm.git_sha": sha.stdout.strip(), "scldm.git_dirty": str(bool(dirty.stdout.strip())).lower()}
    return tags


def read_ids(folder: Path) -> dict[str, Any]:
    """The ids of the MLflow runs of a stage's folder; empty if it has none yet."""
    try:
        return json.loads((folder / IDS).read_text())
    except (OSError, ValueError):
        return {}
