"""Execute a notebook from its first cell to its last, on models and cells that are at hand.

    python docs/notebooks/execute.py model_in_a_notebook model_folder=runs/mine cells_file=cells.h5ad wanted=B
    python docs/notebooks/execute.py a_day_with_scanpy cells_file=pbmc3k.h5ad

writes the outputs into the notebook, which the pages then show. The parameters in the file stay as they are; those that
are not given have the values that the file sets.
"""

from __future__ import annotations

import argparse
import ast
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
SECONDS = 1800  # of one cell, and of the kernel's start on a busy machine
PATHS = (
    "model_folder",
    "cells_file",
    "checkpoint",
    "config",
)  # parameters that are paths: the notebook runs in another folder


def executed(name: str, parameters: Mapping[str, Any], folder: Path) -> nbformat.NotebookNode:
    """Return a notebook with its outputs.

    Args:
        name: Of the notebook, without .ipynb.
        parameters: Values for names that the cell tagged `parameters` sets.
        folder: Where it runs, and writes what it saves.

    Raises:
        ValueError: if a parameter is not one of the notebook.
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if unknown := set(parameters) - names(cell.source):
        raise ValueError(f"the notebook takes {sorted(names(cell.source))}; got {sorted(unknown)}")
    shown = cell.source
    cell.source = "\n".join([shown, *(f"{name} = {value!r}" for name, value in parameters.items())])
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=SECONDS, startup_timeout=SECONDS, resources=where).execute()
    cell.source = shown
    return notebook


def names(source: str) -> set[str]:
    """Return what a cell assigns."""
    return {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def parameter(text: str) -> tuple[str, Any]:
    """Return the name and the value of `name=value`; a value that is no literal of Python is a text."""
    name, _, value = text.partition("=")
    if name in PATHS:
        return name, str(Path(value).resolve())
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", choices=sorted(p.stem for p in FOLDER.glob("*.ipynb")))
    parser.add_argument("parameters", nargs="*", type=parameter, metavar="name=value", help="of its cell of parameters")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(given.notebook, dict(given.parameters), Path(folder))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, other ones every time
    nbformat.write(notebook, FOLDER / f"{given.notebook}.ipynb")


if __name__ == "__main__":
    main()
