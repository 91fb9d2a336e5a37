"""The command `scldm validate-data`: looks at data of strangers in a child process with a limit on its memory.

The child may be killed by a broken file (a crash in HDF5, memory): the parent says so and exits with 2, like for any
other bad file.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Labels = Annotated[list[str] | None, typer.Option("--label", help="obs column to condition on; may be repeated.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the findings there too.")]
_CHILD = "from pipeline.cli.data import child; child()"
Answer = Callable[[Any], Any]


def validate_data(
    uri: Annotated[str, typer.Argument(help="h5ad file, folder or pattern; Cell Ranger output; SOMA experiment.")],
    label: Labels = None,
    layer: Annotated[str | None, typer.Option(help="Where the counts are, as ingest.source.layer.")] = None,
    gene_id: Annotated[str | None, typer.Option(help="var column of gene ids, as ingest.source.gene_id.")] = None,
    genome: Annotated[str | None, typer.Option(help="Genome of a Cell Ranger output that holds several.")] = None,
    counts: Annotated[bool, typer.Option("--counts/--no-counts", help="Read the counts, or the tables only.")] = True,
    region: Annotated[str | None, typer.Option(help="AWS region of an s3:// address.")] = None,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="Read s3:// without an account.")] = False,
    endpoint: Annotated[str | None, typer.Option(help="S3 server that is not AWS, http(s)://host:port.")] = None,
    memory_gib: Annotated[float, typer.Option(min=1, help="Most memory that reading may take.")] = 16,
    json_file: JsonFile = None,
) -> None:
    """Say what data hold and all that is wrong with them. Exit code 0: usable; 2: not.

    Files of strangers are safe to look at: what reaches outside a file is refused, nothing is unpickled.

    Example: `scldm validate-data cells.h5ad --label cell_type --json findings.json`
    """
    from pipeline.cli.app import reported

    with reported():
        data = {"uri": uri, "labels": label or [], "layer": layer, "gene_id": gene_id, "genome": genome}
        access = {"region": region, "anonymous": anonymous, "endpoint": endpoint}
        answers = ask({**data, **access, "counts": counts}, memory_gib)
        for answer in answers:
            typer.echo(answer["text"])
        if json_file is not None:
            found = [{k: v for k, v in a.items() if k != "text"} for a in answers]
            json_file.write_text(json.dumps({"uri": uri, "usable": all(a["usable"] for a in found), "found": found}))
        if not all(a["usable"] for a in answers):
            raise typer.Exit(2)


def ask(question: dict[str, Any], memory_gib: float, child: str = _CHILD) -> Any:
    """What a child process answers; its code ends in `serve`.

    Raises:
        InputError: the child was killed, by the file or by the limit on its memory.
    """
    from pipeline.core.manifest import InputError

    with tempfile.TemporaryDirectory(prefix="scldm-") as folder:
        out = Path(folder) / "answers.json"
        order = json.dumps({"question": question, "out": str(out), "memory": int(memory_gib * 2**30)})
        # The same code in the child, wherever the parent was started.
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        done = subprocess.run([sys.executable, "-c", child], input=order, text=True, stderr=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": path}, check=False)  # fmt: skip
        if done.returncode == 0 and out.is_file():
            return json.loads(out.read_text())
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    raise InputError(
        f"{question['uri']} cannot be read: the process that read it ended with {ended} ({last!r}); the file is "
        f"damaged, or needs more memory than {memory_gib:g} GiB (--memory-gib)"
    )


def child() -> None:
    """The child of validate-data."""
    from pipeline.data.inspection.examine import examine  # before the limit: libraries are mapped, not data

    serve(lambda question: [{**found.to_json(), "text": found.text()} for found in examine(question)])


def serve(answer: Answer) -> None:
    """Read a question from stdin, write the answer as JSON to the file that it names."""
    order = json.loads(sys.stdin.read())
    from pipeline.data.inspection.examine import Question

    if "://" not in order["question"]["uri"]:
        # Private memory, without the libraries' mapped files.
        resource.setrlimit(resource.RLIMIT_DATA, (order["memory"], order["memory"]))
    question = Question(**{**order["question"], "labels": tuple(order["question"].get("labels", ()))})
    Path(order["out"]).write_text(json.dumps(answer(question)))
