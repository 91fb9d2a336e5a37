"""The file that a verb writes: checked before anything is computed, and there whole or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pipeline.core.files import replaces

if TYPE_CHECKING:
    import anndata

PACKED = {"compression": "gzip", "compression_opts": 1}


def check_out(out: Path, problems: list[str], *, force: bool, read: Path | None = None) -> Path:
    """Return the file to write; a file that may not be written is a problem.

    Args:
        read: The file that is read, which is never replaced.
    """
    out = out.expanduser()
    if out.suffix.lower() != ".h5ad":
        problems.append(f"--out {out} must end in .h5ad")
    elif out.is_dir():
        problems.append(f"--out {out} is a folder")
    elif read is not None and out.exists() and read.exists() and out.samefile(read):
        problems.append(f"--out {out} is the file that is read: name another one")
    elif out.exists() and not force:
        problems.append(f"{out} exists already: name another file with --out, or give --force to replace it")
    above = next(p for p in out.absolute().parents if p.exists())
    if not above.is_dir():
        problems.append(f"--out {out}: {above} is a file")
    return out


def check_cells(path: Path, problems: list[str]) -> Path:
    """Return the file of cells; one that is not there is a problem."""
    path = path.expanduser()
    if not path.is_file():
        problems.append(f"{path} is no file" if path.exists() else f"{path} does not exist (from {Path.cwd()})")
    return path


def write(cells: anndata.AnnData, out: Path) -> None:
    """Write cells to a file, by rename, and say so."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaces(out) as tmp:
        cells.write_h5ad(tmp, **PACKED)
    typer.echo(f"wrote {out}: {cells.n_obs:,} cells x {cells.n_vars:,} genes")


@contextmanager
def notes() -> Iterator[None]:
    """Print what the model warns of as notes."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in found:
        if warning.category is UserWarning:
            typer.echo(f"note: {warning.message}", err=True)
