"""The command `scldm perturb`: real cells under another condition, in one file, made in this process."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import reported
from pipeline.cli.verbs.asked import asked_classes
from pipeline.cli.verbs.job_line import h5ad_source, say_job
from pipeline.cli.verbs.options import (
    CellsFile,
    Device,
    Force,
    Genes,
    Guidance,
    Layer,
    Match,
    MatchBy,
    MaxMissing,
    ModelPlace,
    Precision,
    Seed,
    load_model,
    raise_problems,
    read_guidance,
    require_flow,
    told_as_options,
)
from pipeline.cli.verbs.output import check_cells, check_out, notes, write

MANY = 20_000  # cells; more are better moved by a job
To = Annotated[
    list[str],
    typer.Option(
        "--to",
        metavar="LABEL=CLASS",
        help="The new class of a label, or CLASS alone if one label has it; LABEL= for none. Repeatable.",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", help="Default: CELLS with -perturbed in its name, here.")
]


class Start(StrEnum):
    latents = "latents"
    control = "control"
    noise = "noise"


class Counts(StrEnum):
    drawn = "drawn"
    changed = "changed"


class Unknown(StrEnum):
    error = "error"
    none = "none"


def perturb(
    model: ModelPlace,
    cells: CellsFile,
    to: To,
    out: Out = None,
    start: Annotated[Start, typer.Option(help="Where a cell begins, as in a perturb job.")] = Start.latents,
    counts: Annotated[Counts, typer.Option(help="New counts, or the cell's own ones changed.")] = Counts.drawn,
    unknown_labels: Annotated[
        Unknown, typer.Option(help="none: cells that lack a label of the model are used without it.")
    ] = Unknown.error,
    seed: Seed = 0,
    guidance: Guidance = None,
    layer: Layer = None,
    match: Match = MatchBy.id,
    genes: Genes = None,
    max_missing: MaxMissing = 0.2,
    precision: Precision = None,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Predict the cells of a file under another condition: those of `Model.perturb`.

    Example: `scldm perturb runs/screen cells.h5ad --to treatment=IFN-beta -o predicted.h5ad`
    """
    with reported():
        problems: list[str] = []
        source = check_cells(cells, problems)
        target = check_out(out or Path(f"{source.stem}-perturbed.h5ad"), problems, force=force, read=source)
        loaded = load_model(model, device, precision, problems)
        asked: dict[str, list[str | None]] = {}
        scales = None
        if loaded is not None:
            require_flow(loaded, model, problems)
            asked = asked_classes(to, loaded.vocabulary, problems, option="--to", may_be_empty=True)
            scales = read_guidance(guidance, list(loaded.labels), problems)
        problems += [
            f"--to names {len(classes)} classes of {label}: one at a time" for label, classes in asked.items()
            if len(classes) > 1
        ]  # fmt: skip
        raise_problems(problems)
        assert loaded is not None
        with notes(), told_as_options():
            made = loaded.perturb(
                source, {label: classes[0] for label, classes in asked.items()}, start=start.value,
                counts=counts.value, unknown_labels=unknown_labels.value, seed=seed, guidance=scales, layer=layer,
                match=match.value, genes=genes, max_missing=max_missing,
            )  # fmt: skip
        if made.n_obs > MANY:
            settings = {"model": model, "source": h5ad_source(source), "to": {k: v[0] for k, v in asked.items()}}
            say_job("perturb", {**settings, "start": start.value, "counts": counts.value, "seed": seed})
        write(made, target)
