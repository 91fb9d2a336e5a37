"""The command line. Groups of commands: jobs, your cells, clusters, models.

Exit codes: 0 done, 1 failed (one line, and where the log is), 2 bad input (what, where, why, how to fix it), 130
Ctrl-C, 143 stopped by SIGTERM. Heavy libraries are imported when a command needs them, so that --help is quick.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.cells import cells_app
from pipeline.cli.cluster import cluster, faults, logs, status, stop, submit
from pipeline.cli.common import JobFile, Overrides, load, reported
from pipeline.cli.config import config_app
from pipeline.cli.data import validate_data
from pipeline.cli.doctor.command import doctor
from pipeline.cli.init.command import init
from pipeline.cli.mlflow import compare, mlflow_app
from pipeline.cli.models import convert, export, presets
from pipeline.cli.upstream.download import download
from pipeline.cli.upstream.parity import parity
from pipeline.cli.verbs.embed import embed
from pipeline.cli.verbs.generate import generate
from pipeline.cli.verbs.perturb import perturb
from pipeline.cli.verbs.show_report import open_report
from pipeline.cluster.loopback import bypass_proxies
from scldm.errors import InputError

app = typer.Typer(
    name="scldm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
runs = typer.Typer(help="Look at what has been made.", no_args_is_help=True)
JOBS, VERBS, DATA, CLUSTERS, MODELS = "Jobs", "A trained model", "Your cells", "Clusters", "Models"  # groups of --help
app.add_typer(runs, name="runs", rich_help_panel=JOBS)
app.add_typer(cluster, name="cluster", rich_help_panel=CLUSTERS)
app.add_typer(cells_app, name="cells", rich_help_panel=DATA)
app.add_typer(config_app, name="config", rich_help_panel=JOBS)
app.add_typer(mlflow_app, name="mlflow", rich_help_panel=JOBS)


def _version(wanted: bool) -> None:
    if wanted:
        import scldm

        typer.echo(f"scldm {scldm.__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Single-cell latent diffusion at Census scale: one YAML file per job.

    Begin with `scldm run jobs/demo.yaml`, or with `scldm init cells.h5ad` for your own cells.
    """
    from pipeline.core.faults import arm

    bypass_proxies()
    if context.invoked_subcommand == "faults":  # it prints the points that the variable may name
        return
    with reported():
        try:
            arm()
        except ValueError as error:
            raise InputError(str(error)) from None


def main() -> None:
    """Run the console script."""
    app()


def _stop_on_sigterm() -> None:
    """Turn SIGTERM, which `ray job stop` and schedulers send, into SystemExit, so that locks and runs are closed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@app.command(rich_help_panel=JOBS)
def run(job: JobFile, overrides: Overrides = None) -> None:
    """Run a job. Finished stages are reused; a changed setting reruns the stages that depend on it.

    Example: `scldm run jobs/demo.yaml train_vae.train.max_steps=50`
    """
    with reported():
        from pipeline.config.io.loader import load_job
        from pipeline.workflow.runner import run_job

        loaded = load_job(job, overrides or [])
        _stop_on_sigterm()
        for line in run_job(loaded, job, overrides or []).lines():
            typer.echo(line)


@app.command(rich_help_panel=JOBS)
def validate(job: JobFile, overrides: Overrides = None) -> None:
    """Check a job file and list every problem.

    Example: `scldm validate jobs/train_vae.yaml resources.workers=4`
    """
    with reported():
        loaded = load(job, overrides)
        from pipeline.config.job import stage_configs

        typer.echo(f"{job}: a valid {loaded.kind} job, {loaded.name} ({', '.join(stage_configs(loaded))})")


@app.command(rich_help_panel=JOBS)
def plan(
    job: JobFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: name, folder, stages, sizes.")] = False,
) -> None:
    """Show what would run and why, with steps, parameters, memory and disk space. Starts nothing.

    Example: `scldm plan jobs/demo.yaml train_vae.train.max_steps=20`
    """
    with reported():
        from pipeline.config.io.loader import load_job
        from pipeline.planning.plan import plan as describe
        from pipeline.planning.plan import plan_data
        from pipeline.workflow.schedule import resolve

        resolved = resolve(load_job(job, overrides or []), job)

        if as_json:
            import json

            typer.echo(json.dumps(plan_data(resolved), indent=1))
        else:
            typer.echo(describe(resolved))


@runs.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="OUTPUT/NAME", help="For example runs/demo.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list, oldest first.")] = False,
) -> None:
    """List the finished stages of a pipeline.

    Example: `scldm runs list runs/demo`
    """
    with reported():
        from pipeline.workflow.history import finished_manifests, finished_stages

        if as_json:
            import json
            from dataclasses import asdict

            typer.echo(json.dumps([asdict(m) for m in finished_manifests(folder)], indent=1))
        else:
            typer.echo(finished_stages(folder))


runs.command("compare")(compare)
for _command in (submit, status, logs, stop, doctor, faults):
    app.command(rich_help_panel=CLUSTERS)(_command)
app.command(rich_help_panel=DATA)(init)
app.command("validate-data", rich_help_panel=DATA)(validate_data)
for _verb in (generate, embed, perturb):
    app.command(rich_help_panel=VERBS)(_verb)
app.command("open", rich_help_panel=JOBS)(open_report)
for _model_command in (download, convert, export, parity, presets):
    app.command(rich_help_panel=MODELS)(_model_command)
