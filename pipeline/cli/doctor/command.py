"""The command `scldm doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import load, reported

JobFile = Annotated[
    Path | None, typer.Argument(metavar="[JOB]", help="A job file: only what this job needs is looked at.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]…", help="Settings to change.")]


def doctor(
    job: JobFile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check this machine: versions, GPUs, NCCL, disk, storage, MLflow, the Census, the token, clocks.

    Each line is ok or says how to fix the problem; exit code 1 if there is one.

    Example: `scldm doctor jobs/census/train_vae.yaml`
    """

    with reported():
        loaded = load(job, overrides) if job is not None else None
        from pipeline.cli.doctor.report import examine, report, requirements_of

        text, code = report(examine(requirements_of(loaded)), as_json=as_json)
        typer.echo(text)
        raise typer.Exit(code)
