"""The command `scldm download`: upstream's published models and data, as files and converted."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import reported
from pipeline.core.text import human

if TYPE_CHECKING:
    from pipeline.data.sources.published import Published, PublishedFiles

LICENCE = (
    "These files are the work of upstream's authors (czi-ai/scldm), under the licence that they state: read it there "
    "before you pass files, or models made from them, on."
)
Groups = Annotated[
    list[str],
    typer.Argument(
        metavar="GROUP…", help="datasets, vae_census, fm_observational, fm_perturbation, resubmission: any of them."
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the files and the converted models.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List files and sizes; download nothing.")]
Convert = Annotated[bool, typer.Option("--convert/--no-convert", help="Whether checkpoints become model folders.")]
Endpoint = Annotated[str | None, typer.Option("--endpoint", metavar="URL", help="A mirror: another S3 server.")]


def download(
    groups: Groups,
    out: Out = Path("models/upstream"),
    dry_run: DryRun = False,
    convert: Convert = True,
    endpoint: Endpoint = None,
) -> None:
    """Download upstream's published files, and convert its checkpoints.

    An interrupted download goes on where it stopped. Sums are checked where S3 states them, and recorded.

    Example: `scldm download vae_census --dry-run`
    """
    with reported():
        from pipeline.config.s3 import S3Client
        from pipeline.data.sources.published import PublishedFiles

        client = S3Client(endpoint=endpoint, addressing="virtual" if endpoint is None else "path")
        files = PublishedFiles(client)
        found = files.list(groups)
        typer.echo("\n".join(f"{human(f.size):>10}  {f.key}" for f in found))
        typer.echo(f"{human(sum(f.size for f in found))} in {len(found)} files")
        if dry_run:
            return
        for file in found:
            _download(files, file, out)
        if convert:
            _convert_all(found, out)
        typer.echo(LICENCE)


def _download(files: PublishedFiles, file: Published, out: Path) -> None:
    with typer.progressbar(length=max(1, file.size), label=file.key) as bar:
        read = files.download(file, out, bar.update)
    if not read:
        typer.echo(f"{file.key}: there already")


def _convert_all(found: list[Published], out: Path) -> None:
    """Convert every checkpoint that has a configuration beside it; those that fail are named together at the end."""
    from scldm.checkpoints.convert.convert import convert_upstream
    from scldm.errors import InputError

    problems = []
    for key in (f.key for f in found if f.key.endswith(".ckpt")):
        checkpoint = out / key
        config, model = checkpoint.with_suffix(".yaml"), out / "converted" / checkpoint.stem
        if model.is_dir() or not config.is_file():
            continue
        try:
            convert_upstream(checkpoint, config, model)
            typer.echo(f"converted: {model}")
        except InputError as error:
            command = shlex.join(["scldm", "convert", str(checkpoint), "--config", str(config), "--out", str(model)])
            problems.append(f"{checkpoint}: {error}; add the options that it names to {command}")
    if problems:
        raise InputError("\n".join(["not converted:", *problems]))
