"""The command `scldm embed`: the latents of real cells, written into a copy of their file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import reported
from pipeline.cli.verbs.job_line import h5ad_source, say_job
from pipeline.cli.verbs.options import (
    CellsFile,
    Device,
    Force,
    Genes,
    Layer,
    Match,
    MatchBy,
    MaxMissing,
    ModelPlace,
    Precision,
    load_model,
    raise_problems,
    told_as_options,
)
from pipeline.cli.verbs.output import check_cells, check_out, notes, write

if TYPE_CHECKING:
    from scldm.api.model import Model

MANY = 200_000  # cells; more are better embedded by a job
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", help="Default: CELLS with -embedded in its name, here.")
]


def embed(
    model: ModelPlace,
    cells: CellsFile,
    out: Out = None,
    layer: Layer = None,
    match: Match = MatchBy.id,
    genes: Genes = None,
    max_missing: MaxMissing = 0.2,
    precision: Precision = None,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Write a copy of a file of cells with their latents in obsm["X_scldm"]: those of `Model.encode`.

    Example: `scldm embed runs/demo cells.h5ad -o embedded.h5ad`
    """
    with reported():
        problems: list[str] = []
        source = check_cells(cells, problems)
        target = check_out(out or Path(f"{source.stem}-embedded.h5ad"), problems, force=force, read=source)
        loaded = load_model(model, device, precision, problems)
        raise_problems(problems)
        assert loaded is not None
        with notes(), told_as_options():
            made = loaded.encode(source, layer=layer, match=match.value, genes=genes, max_missing=max_missing)
        made.uns["X_scldm"] = {**made.uns["X_scldm"], **models_of(loaded)}
        if made.n_obs > MANY:
            say_job("embed", {"model": model, "source": h5ad_source(source)})
        write(made, target)


def models_of(model: Model) -> dict[str, str]:
    """Return the hash of the VAE that made latents, as jobs record it."""
    from scldm.api.parts import digests

    return {"vae": digests(model.folders)["vae"]}
