"""The commands `scldm cells head | verify | concat | export` for the cells of a finished stage.

Exit codes: 0 done, 1 `verify` found problems, 2 the folder holds no finished stage of cells.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import reported
from scldm.errors import InputError

cells_app = typer.Typer(help="Cells of a finished stage.", no_args_is_help=True)

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Stage folder, for example runs/demo/generate/1a2b3c4d5e6f.")
]
OutFile = Annotated[Path, typer.Argument(metavar="OUT", help="File or folder to make.")]


class Sink(StrEnum):
    zarr = "zarr"
    soma = "soma"
    h5ad = "h5ad"
    cell_eval = "cell-eval"


@cells_app.command()
def head(folder: Folder, n: Annotated[int, typer.Option("-n", min=0, help="Rows shown.")] = 5) -> None:
    """Summarise the cells of a stage and show the first rows of obs. Opens the index and one shard.

    Example: `scldm cells head runs/demo/generate/1a2b3c4d5e6f`
    """
    with reported():
        import pandas as pd

        from scldm.cells.cells import open_cells

        cells = open_cells(folder)
        typer.echo(repr(cells))
        about = cells.uns.get("scldm", {})
        typer.echo("    made from: " + ", ".join(f"{k} {str(about[k])[:12]}" for k in ("vae", "flow") if k in about))
        with pd.option_context("display.max_columns", 20, "display.width", 140):
            typer.echo(cells.obs.head(n).to_string())
        for column in cells.obs:
            if isinstance(cells.obs[column].dtype, pd.CategoricalDtype):
                counts = cells.obs[column].value_counts().head(8)
                typer.echo(f"{column}: " + ", ".join(f"{name} {k:,}" for name, k in counts.items()))


@cells_app.command()
def verify(
    folder: Folder,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what was found there too.")
    ] = None,
) -> None:
    """Check every byte: sizes, sha256, names, counts, NaN, and the number of cells of each condition.

    Example: `scldm cells verify runs/demo/generate/1a2b3c4d5e6f --json verdict.json`
    """
    with reported():
        from pipeline.inference.export.verify import verify as verify_cells

        verdict = verify_cells(folder)
        typer.echo(verdict.text())
        if json_file is not None:
            json_file.write_text(json.dumps(verdict.to_json(), indent=1))
        if not verdict.ok:
            raise typer.Exit(1)


@cells_app.command()
def concat(folder: Folder, out: OutFile) -> None:
    """Write all shards to one .h5ad file, up to a million cells. The same as `export --to h5ad`.

    Example: `scldm cells concat runs/demo/generate/1a2b3c4d5e6f cells.h5ad`
    """
    export(folder, out, to=Sink.h5ad)


@cells_app.command()
def export(
    folder: Folder,
    out: OutFile,
    to: Annotated[
        Sink,
        typer.Option(
            "--to",
            help="zarr: a collection for annbatch; soma: an experiment; h5ad: one file; cell-eval: generated and "
            "measured cells, as the tool of that name compares them.",
        ),
    ],
    shuffle: Annotated[
        int | None, typer.Option(min=0, metavar="SEED", help="zarr only: shuffle the cells, for training.")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL=CLASS", help="cell-eval only: the treatment's label and its control class."),
    ] = None,
) -> None:
    """Convert committed shards to another format. A killed export to zarr or soma resumes where it stopped.

    Example: `scldm cells export runs/demo/generate/1a2b3c4d5e6f cells.zarr --to zarr --shuffle 0`
    """
    with reported():
        from scldm.cells.cells import open_cells

        if shuffle is not None and to is not Sink.zarr:
            raise InputError(f"--shuffle works only with --to zarr; {to.value} keeps the order of the cells")
        if control and to is not Sink.cell_eval:
            raise InputError(f"--control works only with --to cell-eval; {to.value} writes the generated cells alone")
        cells = open_cells(folder)
        if to is Sink.cell_eval:
            from pipeline.inference.export.cell_eval import export_cell_eval

            typer.echo(f"wrote {out}; to compare: {export_cell_eval(cells, out, control=_pairs(control or []))}")
            return
        if to is Sink.h5ad:
            from pipeline.inference.export.h5ad import export_h5ad

            export_h5ad(cells, out)
        elif to is Sink.zarr:
            from pipeline.inference.export.zarr import export_zarr

            export_zarr(cells, out, shuffle=shuffle)
        else:
            from pipeline.inference.export.soma import export_soma

            export_soma(cells, out)
        typer.echo(f"wrote {out}: {cells.n_obs:,} cells x {cells.n_vars:,} genes")


def _pairs(texts: list[str]) -> dict[str, str]:
    """Return label -> class of texts LABEL=CLASS."""
    if bad := [text for text in texts if "=" not in text]:
        raise InputError(f"--control takes LABEL=CLASS; got {', '.join(bad)}")
    return {label: value for label, _, value in (text.partition("=") for text in texts)}
