"""The commands for clusters: `scldm submit | status | logs | stop`, `scldm cluster start | stop | drain`, and
`scldm faults`, which lists the points where a drill can kill a process.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import JobFile, Overrides, load, reported
from pipeline.core.fault_points import POINTS
from pipeline.core.faults import FORM, VARIABLE

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: a list of points.")]


cluster = typer.Typer(help="A Ray head on this machine that takes jobs, behind a token.", no_args_is_help=True)

Address = Annotated[
    str | None, typer.Option(help="Ray's job server; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine.")
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="What submit printed, and status lists.")]
PerhapsJobId = Annotated[str | None, typer.Argument(metavar="[ID]", help="What submit printed, and status lists.")]


def submit(
    job: JobFile,
    overrides: Overrides = None,
    address: Address = None,
    working_dir: Annotated[Path, typer.Option(help="Code that is sent to the cluster.")] = Path(),
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the log and return the job's exit code.")
    ] = True,
) -> None:
    """Send a job to a Ray cluster.

    Example: `scldm submit jobs/train_vae.yaml train.max_steps=20 --address http://head:8265`
    """

    with reported():
        loaded = load(job, overrides)  # so that errors show here and not in a job's log
        from pipeline.cluster.submit import submit as send

        code = send(
            job, overrides or [], kind=loaded.kind, name=loaded.name, address=address, working_dir=working_dir,
            wait=wait,
        )  # fmt: skip
        raise typer.Exit(code)


def status(job_id: PerhapsJobId = None, address: Address = None) -> None:
    """List the jobs of a cluster, or show one of them.

    Example: `scldm status`
    """

    with reported():
        from pipeline.cluster.submit import status as describe

        typer.echo(describe(job_id, address))


def logs(
    job_id: PerhapsJobId = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it ends; then with its exit code.")] = False,
) -> None:
    """Print the log of a job, by default of the newest.

    Example: `scldm logs --follow scldm-train_vae-demo-1a2b3c`
    """

    with reported():
        from pipeline.cluster.submit import logs as show

        raise typer.Exit(show(job_id, address, wait=follow))


def stop(
    job_id: JobId,
    address: Address = None,
    seconds: Annotated[float, typer.Option(help="Most seconds to wait for its end.")] = 660,
) -> None:
    """Stop a job. Training writes a checkpoint first, and the same command resumes from it.

    Example: `scldm stop scldm-train_vae-demo-1a2b3c`
    """

    with reported():
        from pipeline.cluster.submit import stop as end

        typer.echo(end(job_id, address, seconds=seconds))


@cluster.command("start", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def start_cluster(
    context: typer.Context,
    root: Annotated[Path | None, typer.Option(help="Where jobs run; default: here if it has jobs/.")] = None,
    port: Annotated[int, typer.Option(help="Of the cluster.")] = 6379,
    dashboard_port: Annotated[int, typer.Option(help="Of the dashboard and the job server.")] = 8265,
    temp_dir: Annotated[Path | None, typer.Option(help="Ray's logs and spilled objects; a short path.")] = None,
) -> None:
    """Start a Ray head with token authentication and the dashboard on the loopback address.

    Options of `ray start` are passed on.

    Example: `scldm cluster start --num-cpus=8`
    """

    with reported():
        from pipeline.cluster.head import start

        head = start(
            root=root, port=port, dashboard_port=dashboard_port, temp_dir=temp_dir,
            arguments=list(context.args),
        )  # fmt: skip
        typer.echo(f"a head runs at port {head.port}; jobs run in {head.root}; log: {head.log}")
        typer.echo(f"  export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS={head.submit_address}")
        typer.echo("  ray job submit jobs/train_vae.yaml        or: scldm submit jobs/train_vae.yaml")
        typer.echo(f"  dashboard: {head.submit_address} (asks for the token)    end it: scldm cluster stop")


@cluster.command("stop")
def stop_cluster(
    force: Annotated[bool, typer.Option("--force", help="Though jobs run: they are killed, not asked.")] = False,
) -> None:
    """Stop the head that `scldm cluster start` started, and no other Ray on this machine.

    Example: `scldm cluster stop`
    """

    with reported():
        from pipeline.cluster.head import stop

        typer.echo(stop(force=force))


@cluster.command("drain")
def drain_node(
    seconds: Annotated[int, typer.Option(min=1, help="Until this machine goes.")] = 120,
    address: Annotated[str | None, typer.Option(help="Of the cluster, host:port; default: RAY_ADDRESS.")] = None,
) -> None:
    """Announce that this node will be taken away: training writes a checkpoint and continues without it.

    For a pod's preStop hook, or a watcher of spot interruption notices. Example: `scldm cluster drain --seconds 120`
    """

    with reported():
        from pipeline.cluster.head import drain

        typer.echo(drain(address=address, seconds=seconds))


def faults(as_json: AsJson = False) -> None:
    """List the fault points: places where SCLDM_FAULT kills a process, to test that a run survives it.

    Example: `scldm faults --json`
    """
    if as_json:
        typer.echo(json.dumps([{"name": name, **asdict(point)} for name, point in POINTS.items()], indent=1))
        return
    width = max(map(len, POINTS))
    for name, point in POINTS.items():
        typer.echo(f"{name:<{width}}  {point.what}  [{point.where}]")
    typer.echo(f"\n{VARIABLE}={FORM}")
    typer.echo(f'for example {VARIABLE}="checkpoint.after_shard:rank=1:n=2:kill" scldm run jobs/demo.yaml')
