"""Runs every check of `scldm doctor` and prints the results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.cli.doctor.finding import Asked, Finding
from pipeline.cli.doctor.machine import disk, gpus, nccl, storage, versions


def asked_by(job: Any) -> Asked:
    """Of a job; of the current folder where there is none."""
    tracking, address = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get("RAY_API_SERVER_ADDRESS")
    if job is None:
        return Asked(output=Path.cwd() / "runs", tracking=tracking, address=address)
    from pipeline.workflow.schedule import output_root

    return Asked(
        output=output_root(job),
        gpus=job.resources.gpus_per_worker > 0,
        census=_source(job) == "census",
        tracking=job.tracking.uri or tracking,
        storage=job.checkpoints if job.checkpoints.storage_path else None,
        address=address,
    )


def _source(job: Any) -> str | None:
    """Type of the source: of the job's own ingest section, or of the ingest that it builds on."""
    from pipeline.config.job import stage_configs
    from pipeline.core.manifest import newest_manifest
    from pipeline.workflow.schedule import pipeline_folder

    if (ingest := stage_configs(job).get("ingest")) is not None:
        return str(ingest.source.type)  # type: ignore[attr-defined]
    made = newest_manifest(pipeline_folder(job), "ingest")
    return made.config["source"]["type"] if made is not None and made.config else None


def examine(asked: Asked) -> list[Finding]:
    """All checks, in the order in which a job would meet the trouble."""
    from pipeline.cli.doctor.network import census, clocks, mlflow, token

    checks: list[Callable[[Asked], Finding]] = [versions, gpus, nccl, disk, storage, mlflow, census, token, clocks]
    return [_safely(check, asked) for check in checks]


def _safely(check: Callable[[Asked], Finding], asked: Asked) -> Finding:
    """A check that breaks is a finding too: the others still run."""
    try:
        return check(asked)
    except Exception as error:
        said = (str(error).splitlines() or ["no message"])[0]
        return Finding(check.__name__, "fail", f"{type(error).__name__}: {said}", "a fault of scldm doctor; report it")


def report(findings: Sequence[Finding], *, as_json: bool) -> tuple[str, int]:
    """The text, and the exit code: 1 if anything failed."""
    failed = sum(f.status == "fail" for f in findings)
    if as_json:
        return json.dumps({"ok": failed == 0, "findings": [asdict(f) for f in findings]}, indent=2), int(failed > 0)
    last = f"{failed} of {len(findings)} checks failed" if failed else "all that was checked is well"
    return "\n".join([*(f.line() for f in findings), last]), int(failed > 0)
