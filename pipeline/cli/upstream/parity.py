"""The command `scldm parity`: compare our numbers with recorded outputs of upstream, one line for each case."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from pipeline.cli.common import reported
from pipeline.core.files import REPOSITORY
from scldm.errors import InputError

Row = Any  # parity.ledger.Row, of the tests

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of cases: pairs NAME.safetensors and NAME.json.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the rows and the summary here.")]
Every = Annotated[bool, typer.Option("--all", help="A line for every quantity, known faults of upstream among them.")]


def parity(folder: Folder, json_file: JsonFile = None, every: Every = False) -> None:
    """Compare this model with outputs recorded from upstream; exit 1 if any differs or is not understood.

    Prints one line for each case: the quantity that came nearest to its tolerance, or every one that failed.

    Example: `scldm parity fixtures/upstream --json parity.json`
    """

    with reported():
        registry = comparison()
        rows: list[Row] = []
        typer.echo(HEADER)
        for _, of_case in groupby(registry.check_folder(folder), key=lambda row: row.case):
            found = list(of_case)
            rows += found
            for text in map(line, found) if every else case_lines(found, registry):
                typer.echo(text)
        total = registry.summary(rows)
        typer.echo(str(total))
        if json_file is not None:
            content = {"summary": vars(total), "rows": [row.as_json() for row in rows]}
            json_file.write_text(json.dumps(content, indent=1) + "\n")
        if total.failures:
            raise typer.Exit(1)


def comparison() -> ModuleType:
    """Import the comparison, which is part of the tests and so of a source checkout only.

    Raises:
        InputError: There is no source checkout.
    """
    tests = REPOSITORY / "tests"
    if not (tests / "parity").is_dir():
        raise InputError(
            f"scldm parity compares with the code in tests/parity of a source checkout, and {REPOSITORY} is not one; "
            "run it in a clone of the repository"
        )
    sys.path.insert(0, str(tests))
    return import_module("parity.registry")


HEADER = f"{'case':<36} {'quantity':<52} {'max abs error':>13} {'tolerance':>10}  ok"


def line(row: Row) -> str:
    """Format one row."""
    error, tolerance = ("-" if x is None else f"{x:.2e}" for x in (row.error, row.tolerance))
    note = f"  ({row.note})" if row.note else ""
    return f"{row.case:<36} {row.quantity:<52} {error:>13} {tolerance:>10}  {row.status}{note}"


def case_lines(rows: list[Row], registry: ModuleType) -> Iterator[str]:
    """Yield the lines of one case."""
    if failed := [row for row in rows if row.failed]:
        yield from map(line, failed)
        return
    faults = sum(row.status == "known fault" for row in rows)
    note = f"  (the nearest of {len(rows)}" + (f"; {faults} known faults of upstream: --all)" if faults else ")")
    yield line(replace(registry.nearest_to_failing(rows), note="")) + note
