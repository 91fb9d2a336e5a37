"""Execute the notebook from its first cell to its last, on models and cells that are at hand.

    python docs/notebooks/execute.py runs/mine cells.h5ad --label cell_type --wanted B

writes the outputs into the notebook, which the pages then show. The parameters in the file stay as they are.
"""

from __future__ import annotations

import argparse
import ast
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("model_in_a_notebook.ipynb")
SECONDS = 800  # of one cell, and of the kernel's start on a busy machine


def executed(parameters: Mapping[str, str], folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs.

    Args:
        parameters: Values for the names that the cell tagged `parameters` sets; all of them.
        folder: Where it runs, and writes what it saves.

    Raises:
        ValueError: if the parameters are not those of the notebook.
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if names(cell.source) != set(parameters):
        raise ValueError(f"the notebook takes {sorted(names(cell.source))}; got {sorted(parameters)}")
    shown, cell.source = cell.source, "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=SECONDS, startup_timeout=SECONDS, resources=where).execute()
    cell.source = shown
    return notebook


def names(source: str) -> set[str]:
    """What a cell assigns."""
    return {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a pipeline, a stage, or a folder of models")
    parser.add_argument("cells", type=Path, help=".h5ad with raw counts")
    parser.add_argument("--label", default="cell_type")
    parser.add_argument("--wanted", required=True, help="a class of the label")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parameters = {"model_folder": str(given.model.resolve()), "cells_file": str(given.cells.resolve())}
        notebook = executed(parameters | {"label": given.label, "wanted": given.wanted}, Path(folder))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, other ones every time
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
