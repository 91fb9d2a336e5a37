"""Runs every check of `scldm doctor` and prints the results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.cli.doctor.finding import Finding, Requirements
from pipeline.cli.doctor.machine import disk, gpus, nccl, storage, versions
from pipeline.cli.doctor.packages import packages


def requirements_of(job: Any) -> Requirements:
    """Return the requirements of a job, or of the current folder if there is no job."""
    tracking, address = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get("RAY_API_SERVER_ADDRESS")
    if job is None:
        return Requirements(output=Path.cwd() / "runs", tracking=tracking, address=address)
    from pipeline.config.job import experiment_name
    from pipeline.workflow.folders import output_root

    return Requirements(
        output=output_root(job),
        gpus=job.resources.gpus_per_worker > 0,
        census=_source(job) == "census",
        tracking=job.tracking.uri or tracking,
        experiment=experiment_name(job),
        storage=job.checkpoints if job.checkpoints.storage_path else None,
        address=address,
    )


def _source(job: Any) -> str | None:
    """Return the type of the source of a job's own ingest section, or of the ingest that it builds on."""
    from pipeline.config.job import stage_configs
    from pipeline.core.manifest import newest_manifest
    from pipeline.workflow.folders import pipeline_folder

    if (ingest := stage_configs(job).get("ingest")) is not None:
        return str(ingest.source.type)  # type: ignore[attr-defined]
    made = newest_manifest(pipeline_folder(job), "ingest")
    return made.config["source"]["type"] if made is not None and made.config else None


def examine(requirements: Requirements) -> list[Finding]:
    """Run all checks, in the order in which a job would meet a problem."""
    from pipeline.cli.doctor.network import census, clocks, mlflow, token

    checks: list[Callable[[Requirements], Finding]] = [
        versions,
        packages,
        gpus,
        nccl,
        disk,
        storage,
        mlflow,
        census,
        token,
        clocks,
    ]
    return [_safely(check, requirements) for check in checks]


def _safely(check: Callable[[Requirements], Finding], requirements: Requirements) -> Finding:
    """Run one check; a check that raises becomes a finding, so that the others still run."""
    try:
        return check(requirements)
    except Exception as error:
        first_line = (str(error).splitlines() or ["no message"])[0]
        return Finding(
            check.__name__, "fail", f"{type(error).__name__}: {first_line}", "a fault of scldm doctor; report it"
        )


def report(findings: Sequence[Finding], *, as_json: bool) -> tuple[str, int]:
    """Return the text and the exit code, which is 1 if anything failed."""
    failed = sum(f.status == "fail" for f in findings)
    if as_json:
        return json.dumps({"ok": failed == 0, "findings": [f.as_json() for f in findings]}, indent=2), int(failed > 0)
    last = f"{failed} of {len(findings)} checks failed" if failed else "all that was checked is well"
    return "\n".join([*(f.line() for f in findings), last]), int(failed > 0)
