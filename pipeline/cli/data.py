"""The command `scldm validate-data`: inspects untrusted data in a child process with a memory limit.

A broken file may kill the child (a crash in HDF5, the memory limit); the parent reports that and exits with 2, as for
any other bad file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.common import reported
from pipeline.data.inspection.sandbox import ask

Labels = Annotated[list[str] | None, typer.Option("--label", help="obs column to condition on; may be repeated.")]
MissingText = Annotated[
    list[str] | None,
    typer.Option(help='Text that is no class but a missing value, as ingest.missing_text; may be repeated. "": none.'),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the findings there too.")]


def validate_data(
    uri: Annotated[str, typer.Argument(help="h5ad file, folder or pattern; Cell Ranger output; SOMA experiment.")],
    label: Labels = None,
    layer: Annotated[str | None, typer.Option(help="Where the counts are, as ingest.source.layer.")] = None,
    measurement: Annotated[str | None, typer.Option(help="SOMA only: as ingest.source.measurement.")] = None,
    gene_id: Annotated[str | None, typer.Option(help="var column of gene ids, as ingest.source.gene_id.")] = None,
    obs: Annotated[Path | None, typer.Option(help="10x only: table of the cells, as ingest.source.obs.")] = None,
    genome: Annotated[str | None, typer.Option(help="Genome of a Cell Ranger output that holds several.")] = None,
    counts: Annotated[bool, typer.Option("--counts/--no-counts", help="Read the counts, or the tables only.")] = True,
    region: Annotated[str | None, typer.Option(help="AWS region of an s3:// address.")] = None,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="Read s3:// without an account.")] = False,
    endpoint: Annotated[str | None, typer.Option(help="S3 server that is not AWS, http(s)://host:port.")] = None,
    missing_text: MissingText = None,
    memory_gib: Annotated[float, typer.Option(min=1, help="Most memory that reading may take.")] = 16,
    json_file: JsonFile = None,
) -> None:
    """Inspect data and list every problem. Exit code 0: usable; 2: not usable.

    Safe on untrusted files: nothing outside the file is followed and nothing is unpickled.

    Example: `scldm validate-data cells.h5ad --label cell_type --json findings.json`
    """

    with reported():
        data: dict[str, Any] = {"uri": uri, "labels": label or [], "layer": layer, "gene_id": gene_id, "genome": genome}
        data |= {"measurement": measurement, "obs": None if obs is None else str(obs)}
        access = {"region": region, "anonymous": anonymous, "endpoint": endpoint}
        if missing_text is not None:
            data["missing_text"] = [text for text in missing_text if text]
        answers = ask({**data, **access, "counts": counts}, memory_gib)
        for answer in answers:
            typer.echo(answer["text"])
        if json_file is not None:
            found = [{k: v for k, v in a.items() if k != "text"} for a in answers]
            json_file.write_text(json.dumps({"uri": uri, "usable": all(a["usable"] for a in found), "found": found}))
        if not all(a["usable"] for a in answers):
            raise typer.Exit(2)
