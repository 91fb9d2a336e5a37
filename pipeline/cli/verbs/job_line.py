"""The command that does as a job what a verb does in its process: in shards, on all cores, resumable."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer


def job_line(kind: str, settings: Mapping[str, Any]) -> str:
    """Return `scldm run jobs/<kind>.yaml` with settings, for a shell."""
    import yaml

    def plain(value: Any) -> str:
        text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6)
        return text.removesuffix("\n").removesuffix("\n...")

    given = [f"{name}={plain(value)}" for name, value in settings.items()]
    return shlex.join(["scldm", "run", f"jobs/{kind}.yaml", *given])


def say_job(kind: str, settings: Mapping[str, Any]) -> None:
    """Name the job, where a file of so many cells is uncomfortable."""
    typer.echo(
        f"note: a job writes many cells as shards, and goes on after a stop: {job_line(kind, settings)}", err=True
    )


def h5ad_source(path: Path) -> dict[str, str]:
    """Return the setting `source` of a file of cells."""
    return {"type": "h5ad", "path": str(path)}
