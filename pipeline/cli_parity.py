"""The command `scldm parity`: our numbers beside upstream's recorded ones, a line for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from scldm.parity.ledger import Row

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of cases: pairs NAME.safetensors and NAME.json.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the rows and the summary here.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only what is not ok, and the summary.")]


def parity(folder: Folder, json_file: JsonFile = None, quiet: Quiet = False) -> None:
    """Compare this model with outputs recorded from upstream; exit 1 if any differs or is not understood.

    Example: `scldm parity fixtures/upstream --json parity.json`
    """
    from pipeline.cli import reported
    from pipeline.stage import InputError

    with reported():
        from scldm.parity.case import FolderError, case_names
        from scldm.parity.registry import check_folder, summary

        try:
            case_names(folder)
        except FolderError as error:
            raise InputError(str(error)) from None
        rows = []
        typer.echo(HEADER)
        for row in check_folder(folder):
            rows.append(row)
            if not (quiet and row.status == "ok"):
                typer.echo(line(row))
        total = summary(rows)
        typer.echo(str(total))
        if json_file is not None:
            content = {"summary": vars(total), "rows": [row.as_json() for row in rows]}
            json_file.write_text(json.dumps(content, indent=1) + "\n")
        if total.failures:
            raise typer.Exit(1)


HEADER = f"{'case':<36} {'quantity':<52} {'max abs error':>13} {'tolerance':>10}  ok"


def line(row: Row) -> str:
    """One row as text."""
    error, tolerance = ("-" if x is None else f"{x:.2e}" for x in (row.error, row.tolerance))
    note = f"  ({row.note})" if row.note else ""
    return f"{row.case:<36} {row.quantity:<52} {error:>13} {tolerance:>10}  {row.status}{note}"
