"""The commands `scldm mlflow sync | register` and `scldm runs compare`.

Exit codes: 0 done, 1 some records could not be sent, 2 bad input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import reported
from scldm.errors import InputError

mlflow_app = typer.Typer(help="MLflow: complete runs after an outage, register models.", no_args_is_help=True)

Folder = Annotated[
    Path,
    typer.Argument(metavar="FOLDER", help="A pipeline (runs/demo) or a stage (runs/demo/train_flow/1a2b3c4d5e6f)."),
]
ModelPlace = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A pipeline (runs/demo), a stage, a folder with vae/ and flow/, a VAE, hf://… or s3://…."
    ),
]
Uri = Annotated[
    str | None,
    typer.Option(
        "--uri", metavar="URI", help="MLflow store; default: that of the runs, MLFLOW_TRACKING_URI, runs/mlflow.db."
    ),
]
Things = Annotated[
    list[str],
    typer.Argument(
        metavar="A B …",
        help="Pipelines (runs/demo), stages (runs/demo/train_flow/1a2b…), MLflow run ids, models:/name@alias.",
    ),
]


@mlflow_app.command()
def sync(folder: Folder, uri: Uri = None) -> None:
    """Complete runs in MLflow after an outage, from the records on disk. Safe to call twice and while a job runs.

    Example: `scldm mlflow sync runs/demo`
    """
    with reported():
        from pipeline.tracking.sync import sync as send

        done = send(folder, uri)
        for one in done:
            typer.echo(one.text())
        if any(one.problem for one in done):
            raise typer.Exit(1)


@mlflow_app.command()
def register(
    model: ModelPlace,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the registered model; default: scldm-PIPELINE, or scldm-FOLDER.")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option("--alias", help="Moves to this version, such as champion; may be given again.")
    ] = None,
    uri: Uri = None,
) -> None:
    """Register any model with its card. VAE and flow predict cells from conditions, a VAE alone latents from counts.

    Example: `scldm mlflow register runs/demo --alias champion`
    """
    with reported():
        from pipeline.tracking.mlflow_runs.client import chosen_uri
        from pipeline.tracking.mlflow_runs.register import register as put
        from scldm.api.folders import is_remote

        near = None if is_remote(model) else Path(model)
        made = put(model, uri=chosen_uri(uri, near), name=name, aliases=tuple(alias or ()))
        typer.echo(made.text())


def compare(
    things: Things,
    every: Annotated[bool, typer.Option("--all", help="Every score, not the key ones alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
    uri: Uri = None,
) -> None:
    """Compare runs: settings that differ, scores with their floors, provenance.

    A star marks the score nearest to its floor, which is real cells against real cells. Folders need no server.

    Example: `scldm runs compare runs/demo runs/other`, or `scldm runs compare models:/scldm-demo@champion runs/demo`
    """
    with reported():
        from pipeline.tracking.comparison.compare import ComparedRun
        from pipeline.tracking.comparison.compare import compare as compare_runs
        from pipeline.tracking.comparison.fetch import from_run, is_run
        from pipeline.tracking.comparison.records import from_folder
        from pipeline.tracking.comparison.text import as_text
        from pipeline.tracking.mlflow_runs.client import chosen_uri

        if len(things) < 2:
            raise InputError(f"compare takes two or more; got {things[0]} alone")
        problems, sides = [], []
        for thing in things:
            try:
                stages = from_run(thing, chosen_uri(uri)) if is_run(thing) else from_folder(Path(thing))
                sides.append(ComparedRun(thing, stages))
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise InputError("\n".join(problems))
        found = compare_runs(sides, every=every)
        typer.echo(found.to_json() if as_json else as_text(found))
