"""The command `scldm init`: inspects the user's cells and writes a job file with the reason for every choice."""

from __future__ import annotations

import os
import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import reported
from scldm.errors import InputError

if TYPE_CHECKING:
    from pipeline.cli.init.inspect import SourceSummary

CENSUS = re.compile(r"census(?::(?P<version>[A-Za-z0-9._-]+))?(?:/(?P<organism>[a-z_]+))?")
DEFAULT_CENSUS = "2025-01-30"

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
        named = name or _name(source)
        path = out or (Path("jobs") if Path("jobs").is_dir() else Path()) / f"{named}.yaml"
        _check(source, path, given, tissue, force)
        access = {**given, "obs": None if obs is None else str(obs), "anonymous": anonymous, "counts": counts}
        summary = _census(source) or _inspect(source, access, memory_gib)
        text, words = _make(summary, named, path, given | {"anonymous": anonymous}, label or [], tissue or [], gpus)
        _write(path, text, force)
        typer.echo(words)


def _make(
    summary: SourceSummary, name: str, path: Path, given: dict[str, Any], requested: list[str], tissues: list[str],
    gpus: int,
) -> tuple[str, str]:  # fmt: skip
    """Return the text of the job file and the summary for the terminal."""
    from pipeline.cli.init.defaults import choose
    from pipeline.cli.init.labels import Labels, Verdict, choose_labels
    from pipeline.cli.init.render import job_text
    from pipeline.cli.init.summary import summary_text

    if summary.kind == "Census":
        taken = tuple(requested) or ("cell_type", *(["tissue_general"] if len(tissues) > 1 else []))
        labels = Labels(taken, tuple(Verdict(c, True, "a column of every Census release") for c in taken), 0)
    else:
        labels = choose_labels(summary.columns, summary.n_cells, requested, renamed=summary.kind != "SOMA")
    choices = choose(summary, labels, gpus=gpus, cpus=os.cpu_count() or 1)
    cells: dict[str, Any] = {} if summary.kind != "Census" else {"is_primary_data": True}
    cells |= {"tissue": tissues} if tissues else {}
    text = job_text(summary, labels, choices, name=name, source=_source(summary, given), cells=cells,
                    command=_command(summary.uri, path, gpus, requested, tissues), path=str(path))  # fmt: skip
    _validated(text, path)
    return text, summary_text(summary, labels, choices, path)


def _inspect(source: str, access: dict[str, Any], memory_gib: float) -> SourceSummary:
    """Inspect the source in a child process.

    Raises:
        InputError: The source cannot be used.
    """
    from pipeline.cli.init.inspect import CHILD, SourceSummary
    from pipeline.data.inspection.sandbox import ask
    from scldm.text import shown

    typer.echo(f"looking at {shown(source, 200)} …", err=True)
    found = ask({"uri": source, **access}, memory_gib, CHILD)
    if "errors" in found:
        raise InputError("\n".join([f"{shown(source, 200)} cannot be used:", *(f"  {e}" for e in found["errors"])]))
    return SourceSummary(
        **{**found, "other_places": tuple(found["other_places"]), "warnings": tuple(found["warnings"])}
    )


def _census(source: str) -> SourceSummary | None:
    from pipeline.cli.init.defaults import CENSUS_GENES
    from pipeline.cli.init.inspect import SourceSummary

    if CENSUS.fullmatch(source) is None or Path(source).exists():
        return None
    return SourceSummary(source, "Census", 1, 0, CENSUS_GENES, None, None, None, None, None)


def _source(summary: SourceSummary, given: dict[str, Any]) -> dict[str, Any]:
    """Return ingest.source; local paths are absolute, so that the job runs from any folder."""
    from scldm.text import shown

    uri = summary.uri if "://" in summary.uri else str(Path(summary.uri).expanduser().absolute())
    if summary.kind == "Census":
        match = CENSUS.fullmatch(summary.uri)
        assert match is not None  # `_census` made it of such a text
        version, organism = match["version"] or DEFAULT_CENSUS, match["organism"] or "homo_sapiens"
        return {"type": "census", "version": version, "organism": organism}
    if summary.kind == "SOMA":
        more = {"layer": summary.layer, "region": given["region"], "anonymous": given["anonymous"] or None}
        more |= {"measurement": given.get("measurement")}
        found: dict[str, Any] = {"type": "soma", "uri": uri, **more}
    elif summary.kind == "10x":
        table = given["obs"] and str(Path(given["obs"]).expanduser().absolute())
        found = {"type": "10x", "path": uri, "genome": given["genome"], "obs": table}
    else:
        names = {"layer": summary.layer, "gene_id": summary.gene_id, "gene_name": summary.gene_name}
        found = {"type": "h5ad", "path": uri, **names}
    if uri != shown(uri, 10**6):
        raise InputError(f"{shown(uri, 200)}: the path holds characters that cannot be printed; rename the file")
    return {k: v for k, v in found.items() if v is not None}


# ---- checks ------------------------------------------------------------------------------------------------------
def _check(source: str, path: Path, given: dict[str, Any], tissue: list[str] | None, force: bool) -> None:
    """Check what can be checked without the cells; all problems at once."""

    problems = []
    census = CENSUS.fullmatch(source) is not None and not Path(source).exists()
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


def _validated(text: str, path: Path) -> None:
    """Validate the new job before it is written. An invalid one is our bug, or holds a name that is not allowed."""
    from pipeline.config.io.loader import RawJob, validate
    from pipeline.config.io.yaml import read_document
    from pipeline.workflow.preflight import check_settings

    document = read_document(text, str(path))
    check_settings(validate(RawJob(str(path), document.data, document.lines)))


def _write(path: Path, text: str, force: bool) -> None:
    """Write the file atomically; a file that appeared in the meantime is not replaced."""

    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not force:
            path.touch(exist_ok=False)  # fails if the file was created after the check
        tmp.write_text(text)
        tmp.chmod(0o755)
        tmp.replace(path)
    except FileExistsError:
        raise InputError(f"{path} exists; another name with --out, or --force to replace it") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({(error.strerror or str(error)).lower()}); --out elsewhere"
        ) from None
    finally:
        with suppress(OSError):  # the folder may be a file, or not ours
            tmp.unlink()


# ---- words -------------------------------------------------------------------------------------------------------
def _name(source: str) -> str:
    """Return a valid name for the pipeline."""
    last = [p for p in re.split(r"[/\\]", source.partition("*")[0]) if p] or ["cells"]
    if last[-1] in ("outs", "filtered_feature_bc_matrix", "filtered_gene_bc_matrices") and len(last) > 1:
        last = [p for p in last if p not in ("outs", "filtered_feature_bc_matrix", "filtered_gene_bc_matrices")] or last
    stem = re.sub(r"(?i)\.(h5ad|h5|soma)$", "", last[-1])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:100] or "cells"


def _command(uri: str, path: Path, gpus: int, requested: list[str], tissues: list[str]) -> str:
    words = ["scldm", "init", uri, "-o", str(path)]
    words += [w for x in requested for w in ("--label", x)] + [w for x in tissues for w in ("--tissue", x)]
    return shlex.join(words + (["--gpus", str(gpus)] if gpus else []))
