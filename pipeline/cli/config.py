"""The commands `scldm config reference | schema`: all settings as a page and as a JSON schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import reported
from scldm.errors import InputError

config_app = typer.Typer(help="All settings of a job file.", no_args_is_help=True)

OutFile = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write there instead of the terminal.")
]


@config_app.command()
def reference(out: OutFile = None) -> None:
    """Print docs/configuration.md: every key with its type, default, unit and meaning.

    Example: `scldm config reference -o docs/configuration.md`
    """

    with reported():
        from pipeline.config.io.reference import reference as text

        _say(text(), out)


@config_app.command()
def schema(out: OutFile = None) -> None:
    """Print the JSON schema of a job file, for editors that complete and check YAML.

    Example: `scldm config schema -o job.schema.json`
    """

    with reported():
        from pipeline.config.io.loader import json_schema

        _say(json.dumps(json_schema(), indent=1) + "\n", out)


def _say(text: str, out: Path | None) -> None:

    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({(error.strerror or str(error)).lower()})") from None
    typer.echo(f"wrote {out}", err=True)
