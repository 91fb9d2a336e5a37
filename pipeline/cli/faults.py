"""The command `scldm faults`: where a process can be made to die, for drills."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from pipeline.core.fault_points import POINTS
from pipeline.core.faults import FORM, VARIABLE

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: a list of points.")]


def faults(as_json: AsJson = False) -> None:
    """List the fault points: places where SCLDM_FAULT makes a process die, to see a run survive it.

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
