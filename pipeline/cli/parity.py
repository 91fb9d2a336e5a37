"""The command `scldm parity`: our numbers beside upstream's recorded ones, a line for each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from scldm.parity.ledger import Row

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of cases: pairs NAME.safetensors and NAME.json.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the rows and the summary here.")]
Every = Annotated[bool, typer.Option("--all", help="A line for every quantity, known faults of upstream among them.")]


def parity(folder: Folder, json_file: JsonFile = None, every: Every = False) -> None:
    """Compare this model with outputs recorded from upstream; exit 1 if any differs or is not understood.

    One line for each case: the quantity that came nearest to its tolerance, or every one that failed.

    Example: `scldm parity fixtures/upstream --json parity.json`
    """
    from pipeline.cli.common import reported
    from scldm.errors import InputError

    with reported():
        from scldm.parity.case import FolderError, case_names
        from scldm.parity.registry import check_folder, summary

        try:
            case_names(folder)
        except FolderError as error:
            raise InputError(str(error)) from None
        rows: list[Row] = []
        typer.echo(HEADER)
        for _, of_case in groupby(check_folder(folder), key=lambda row: row.case):
            found = list(of_case)
            rows += found
            for text in map(line, found) if every else case_lines(found):
                typer.echo(text)
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


def case_lines(rows: list[Row]) -> Iterator[str]:
    """The lines of one case."""
    from scldm.parity.registry import nearest_to_failing

    if failed := [row for row in rows if row.failed]:
        yield from map(line, failed)
        return
    faults = sum(row.status == "known fault" for row in rows)
    note = f"  (the nearest of {len(rows)}" + (f"; {faults} known faults of upstream: --all)" if faults else ")")
    yield line(replace(nearest_to_failing(rows), note="")) + note
