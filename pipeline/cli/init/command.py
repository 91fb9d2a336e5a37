"""The command `scldm init`: inspects the user's cells and writes a job file with the reason for every choice."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.common import reported
from pipeline.cli.init.job import Wanted, is_census, look_at, make_job, name_of, write_job
from scldm.errors import InputError

LabelNames = Annotated[
    list[str] | None, typer.Option("--label", help="obs column to condition on, instead of those found; repeatable.")
]
Tissues = Annotated[list[str] | None, typer.Option("--tissue", help="Census only: take cells of this tissue_general.")]
OutFile = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="JOB", help="Job file to write; default: jobs/NAME.yaml.")
]


def init(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CELLS", help="h5ad file or pattern; Cell Ranger folder or .h5; SOMA experiment; census:2025-01-30."
        ),
    ],
    out: OutFile = None,
    label: LabelNames = None,
    layer: Annotated[str | None, typer.Option(help="Where the counts are, as ingest.source.layer.")] = None,
    measurement: Annotated[str | None, typer.Option(help="SOMA only: as ingest.source.measurement.")] = None,
    gene_id: Annotated[str | None, typer.Option(help="var column of gene ids, as ingest.source.gene_id.")] = None,
    obs: Annotated[Path | None, typer.Option(help="10x only: table of the cells, as ingest.source.obs.")] = None,
    genome: Annotated[str | None, typer.Option(help="10x only: as ingest.source.genome.")] = None,
    tissue: Tissues = None,
    gpus: Annotated[int, typer.Option(min=0, max=1024, help="GPUs to write the job for; 0: CPUs.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the steps and cells, for a first look.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the pipeline; default: of the file.")] = None,
    counts: Annotated[bool, typer.Option("--counts/--no-counts", help="Read the counts, or the tables only.")] = True,
    region: Annotated[str | None, typer.Option(help="AWS region of an s3:// address.")] = None,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="Read s3:// without an account.")] = False,
    memory_gib: Annotated[float, typer.Option(min=1, help="Most memory that reading may take.")] = 16,
    force: Annotated[bool, typer.Option("--force", help="Replace the job file that is there.")] = False,
) -> None:
    """Inspect your cells and write a commented job file for them. Prints what it chose and why.

    Example: `scldm init cells.h5ad -o jobs/mine.yaml`
    """

    with reported():
        given = {"layer": layer, "gene_id": gene_id, "obs": obs, "genome": genome, "region": region}
        given |= {"measurement": measurement}
        named = name or name_of(source)
        path = out or (Path("jobs") if Path("jobs").is_dir() else Path()) / f"{named}.yaml"
        _check(source, path, given, tissue, force)
        access = {**given, "obs": None if obs is None else str(obs), "anonymous": anonymous, "counts": counts}
        summary = look_at(source, access, memory_gib=memory_gib, tell=lambda line: typer.echo(line, err=True))
        labels, tissues = label or [], tissue or []
        wanted = Wanted(
            named, path, _command(summary.uri, path, gpus, labels, tissues, quick=quick),
            given | {"anonymous": anonymous}, labels, tissues, gpus, quick=quick,
        )  # fmt: skip
        text, words = make_job(summary, wanted)
        write_job(path, text, force=force)
        typer.echo(words)


def _check(source: str, path: Path, given: dict[str, Any], tissue: list[str] | None, force: bool) -> None:
    """Check what can be checked without the cells; all problems at once."""

    problems = []
    census = is_census(source)
    if tissue and not census:
        problems.append("--tissue is of the Census (census:2025-01-30); of other sources set ingest.cells")
    if census and (wrong := [f"--{k.replace('_', '-')}" for k, v in given.items() if v is not None]):
        problems.append(f"{', '.join(wrong)}: the Census says this itself; leave it out")
    if path.is_dir():
        problems.append(f"--out {path} is a folder; name a file in it: --out {path / 'mine.yaml'}")
    elif path.exists() and not force:
        problems.append(f"{path} exists; another name with --out, or --force to replace it")
    if problems:
        raise InputError("\n".join(problems))


def _command(uri: str, path: Path, gpus: int, requested: list[str], tissues: list[str], *, quick: bool = False) -> str:
    words = ["scldm", "init", uri, "-o", str(path)]
    words += [w for x in requested for w in ("--label", x)] + [w for x in tissues for w in ("--tissue", x)]
    words += ["--gpus", str(gpus)] if gpus else []
    return shlex.join(words + (["--quick"] if quick else []))
