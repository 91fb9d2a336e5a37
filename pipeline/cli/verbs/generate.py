"""The command `scldm generate`: cells of a trained model in one file, made in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.common import reported
from pipeline.cli.verbs.asked import asked_classes, combinations
from pipeline.cli.verbs.job_line import say_job
from pipeline.cli.verbs.options import (
    Device,
    Force,
    Guidance,
    ModelPlace,
    Precision,
    Seed,
    load_model,
    raise_problems,
    read_guidance,
    require_flow,
    told_as_options,
)
from pipeline.cli.verbs.output import check_out, notes, write

MANY = 20_000  # cells; more are better made by a job
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="CLASS",
        help="A class of the model, or LABEL=CLASS; repeatable. Classes of several labels are combined, those of one "
        "label are made one after the other. Default: unconditional cells.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The .h5ad file to write.")]


def generate(
    model: ModelPlace,
    label: Labels = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Cells of each class or combination.")] = 1000,
    out: Out = Path("generated.h5ad"),
    seed: Seed = 0,
    guidance: Guidance = None,
    precision: Precision = None,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Generate cells of a trained model into one file, in this process: the cells of `Model.generate`.

    Example: `scldm generate runs/demo --label "B cell" -n 1000 -o cells.h5ad`
    """
    with reported():
        problems: list[str] = []
        out = check_out(out, problems, force=force)
        loaded = load_model(model, device, precision, problems)
        rows: list[dict[str, Any]] = []
        scales = None
        if loaded is not None:
            require_flow(loaded, model, problems)
            rows = combinations(asked_classes(label or [], loaded.vocabulary, problems, option="--label"))
            scales = read_guidance(guidance, list(loaded.labels), problems)
        raise_problems(problems)
        assert loaded is not None
        if n * len(rows) > MANY:
            asked: dict[str, Any] = {"model": model, "like": None, "n_cells": None, "seed": seed}
            asked |= {"cells": [{**row, "n_cells": n} for row in rows]}
            say_job("generate", asked if scales is None else {**asked, "sampler.guidance": scales})
        with notes(), told_as_options():
            cells = loaded.generate(rows, n=n, seed=seed, guidance=scales)
        write(cells, out)
