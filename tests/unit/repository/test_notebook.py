"""The notebook in docs/notebooks runs from its first cell to its last, and the page shows lines that it has."""

from __future__ import annotations

import runpy
from pathlib import Path

import nbformat
import pytest
from helpers.stages.cell_stages import models, real_cells

DOCS = Path(__file__).resolve().parents[3] / "docs"
PARAMETERS = {"model_folder": "mine", "cells_file": "small.h5ad", "label": "cell_type", "wanted": "B"}


@pytest.fixture(scope="module")
def execute():
    return runpy.run_path(str(DOCS / "notebooks" / "execute.py"))


def test_every_cell_runs_and_the_file_stays_as_it_is(execute, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    models(tmp_path / "mine")
    real_cells(300).write_h5ad(tmp_path / "small.h5ad")
    before = execute["NOTEBOOK"].read_bytes()
    notebook = execute["executed"](PARAMETERS, tmp_path)
    said = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", []))
    assert "AnnData object with n_obs × n_vars = 200 × 6" in said
    assert "auroc" in said
    assert "(64, 6)" in said
    assert (tmp_path / "shared_model" / "README.md").is_file()
    assert execute["NOTEBOOK"].read_bytes() == before
    assert [c.source for c in notebook.cells] == [c.source for c in nbformat.read(execute["NOTEBOOK"], 4).cells]


def test_parameters_that_the_notebook_does_not_take_are_refused(execute, tmp_path):
    with pytest.raises(ValueError, match="the notebook takes"):
        execute["executed"]({"model": "mine"}, tmp_path)


def test_the_lines_on_the_page_are_the_notebooks(execute):
    page = (DOCS / "python_api.md").read_text()
    [block] = [b.split("```")[0] for b in page.split("```python\n")[1:] if "import anndata" in b]
    sources = "\n".join(c.source for c in nbformat.read(execute["NOTEBOOK"], 4).cells if c.cell_type == "code")
    for line in block.splitlines():
        assert line in sources.splitlines(), f"docs/python_api.md has a line that the notebook has not: {line}"
