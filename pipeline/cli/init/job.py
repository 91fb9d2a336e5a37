"""From a source to a job file: what `scldm init` and `scldm.train` both do.

The source is inspected in a child process, settings are chosen with a reason each, and the job is validated before it
is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scldm.errors import InputError

if TYPE_CHECKING:
    from pipeline.cli.init.continued import Continued
    from pipeline.cli.init.inspect import SourceSummary

CENSUS = re.compile(r"census(?::(?P<version>[A-Za-z0-9._-]+))?(?:/(?P<organism>[a-z_]+))?")
DEFAULT_CENSUS = "2025-01-30"


@dataclass(frozen=True)
class Wanted:
    """What a job is written for."""

    name: str  # of the pipeline
    path: Path  # of the job file
    command: str  # that writes it, for its header
    source: Mapping[str, Any] = field(default_factory=dict)  # settings of ingest.source that were given
    labels: Sequence[str] = ()  # obs columns; none: those that are found
    tissues: Sequence[str] = ()  # of the Census
    gpus: int = 0
    ray: bool = True  # False: a job for one machine alone
    quick: bool = False  # a quarter of the steps, for a first look
    output: str = "runs"
    start: Continued | None = None  # what is trained on; None: new networks


def is_census(source: str) -> bool:
    """Return whether a source names a release of the Census and no file."""
    return CENSUS.fullmatch(source) is not None and not Path(source).exists()


def look_at(source: str, access: Mapping[str, Any], *, memory_gib: float, tell: Callable[[str], None]) -> SourceSummary:
    """Inspect a source in a child process; of the Census nothing is read.

    Args:
        access: Settings of ingest.source that reading needs, and `counts`: whether they are read.
        memory_gib: Most memory that reading may take.
        tell: Gets a line of progress.

    Raises:
        InputError: The source cannot be used.
    """
    from pipeline.cli.init.defaults import CENSUS_GENES
    from pipeline.cli.init.inspect import CHILD, SourceSummary
    from pipeline.data.inspection.sandbox import ask
    from scldm.text import shown

    if is_census(source):
        return SourceSummary(source, "Census", 1, 0, CENSUS_GENES, None, None, None, None, None)
    tell(f"looking at {shown(source, 200)} …")
    found = ask({"uri": source, **access}, memory_gib, CHILD)
    if "errors" in found:
        raise InputError("\n".join([f"{shown(source, 200)} cannot be used:", *(f"  {e}" for e in found["errors"])]))
    return SourceSummary(
        **{**found, "other_places": tuple(found["other_places"]), "warnings": tuple(found["warnings"])}
    )


def make_job(summary: SourceSummary, wanted: Wanted) -> tuple[str, str]:
    """Return the text of the job file, validated, and what was chosen and why, for the terminal."""
    from pipeline.cli.init.defaults import choose
    from pipeline.cli.init.labels import Labels, Verdict, choose_labels
    from pipeline.cli.init.render import job_text
    from pipeline.cli.init.summary import summary_text

    requested, tissues = list(wanted.labels), list(wanted.tissues)
    if summary.kind == "Census":
        taken = tuple(requested) or ("cell_type", *(["tissue_general"] if len(tissues) > 1 else []))
        labels = Labels(taken, tuple(Verdict(c, True, "a column of every Census release") for c in taken), 0)
    else:
        labels = choose_labels(summary.columns, summary.n_cells, requested, renamed=summary.kind != "SOMA")
    choices = choose(summary, labels, gpus=wanted.gpus, cpus=os.cpu_count() or 1, ray=wanted.ray, quick=wanted.quick)
    cells: dict[str, Any] = {} if summary.kind != "Census" else {"is_primary_data": True}
    cells |= {"tissue": tissues} if tissues else {}
    text = job_text(summary, labels, choices, name=wanted.name, source=_source(summary, wanted.source), cells=cells,
                    command=wanted.command, path=str(wanted.path), output=wanted.output,
                    start=wanted.start)  # fmt: skip
    _validate(text, wanted.path)
    shown_choices = choices if wanted.start is None else wanted.start.described(choices)
    return text, summary_text(summary, labels, shown_choices, wanted.path)


def write_job(path: Path, text: str, *, force: bool) -> None:
    """Write a job file atomically; a file that appeared in the meantime is not replaced unless `force` is set."""

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


def name_of(source: str) -> str:
    """Return a valid name for the pipeline."""
    last = [p for p in re.split(r"[/\\]", source.partition("*")[0]) if p] or ["cells"]
    if last[-1] in ("outs", "filtered_feature_bc_matrix", "filtered_gene_bc_matrices") and len(last) > 1:
        last = [p for p in last if p not in ("outs", "filtered_feature_bc_matrix", "filtered_gene_bc_matrices")] or last
    stem = re.sub(r"(?i)\.(h5ad|h5|soma)$", "", last[-1])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:100] or "cells"


def _source(summary: SourceSummary, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ingest.source; local paths are absolute, so that the job runs from any folder."""
    from scldm.text import shown

    uri = summary.uri if "://" in summary.uri else str(Path(summary.uri).expanduser().absolute())
    if summary.kind == "Census":
        match = CENSUS.fullmatch(summary.uri)
        assert match is not None  # `_census` made it of such a text
        version, organism = match["version"] or DEFAULT_CENSUS, match["organism"] or "homo_sapiens"
        return {"type": "census", "version": version, "organism": organism}
    if summary.kind == "SOMA":
        more = {"layer": summary.layer, "region": given.get("region"), "anonymous": given.get("anonymous") or None}
        more |= {"measurement": given.get("measurement")}
        found: dict[str, Any] = {"type": "soma", "uri": uri, **more}
    elif summary.kind == "10x":
        table = given.get("obs") and str(Path(given["obs"]).expanduser().absolute())
        found = {"type": "10x", "path": uri, "genome": given.get("genome"), "obs": table}
    else:
        names = {"layer": summary.layer, "gene_id": summary.gene_id, "gene_name": summary.gene_name}
        found = {"type": "h5ad", "path": uri, **names}
    if uri != shown(uri, 10**6):
        raise InputError(f"{shown(uri, 200)}: the path holds characters that cannot be printed; rename the file")
    return {k: v for k, v in found.items() if v is not None}


def _validate(text: str, path: Path) -> None:
    """Validate the new job before it is written. An invalid one is our bug, or holds a name that is not allowed."""
    from pipeline.config.io.loader import RawJob, validate
    from pipeline.config.io.yaml import read_document
    from pipeline.workflow.preflight import check_settings

    document = read_document(text, str(path))
    check_settings(validate(RawJob(str(path), document.data, document.lines)))
