"""The notebooks in docs/notebooks run from their first cell to their last, and the page shows lines that one has."""

from __future__ import annotations

import runpy
from pathlib import Path

import nbformat
import pytest
from helpers.models.small_models import CELL_TYPES, DONORS, write_flow, write_vae
from helpers.stages.cell_stages import models, real_cells
from typer.testing import CliRunner

from pipeline.cli.app import app

DOCS = Path(__file__).resolve().parents[3] / "docs"
NOTEBOOKS = DOCS / "notebooks"
MODEL = "model_in_a_notebook"


@pytest.fixture(scope="module")
def execute():
    return runpy.run_path(str(NOTEBOOKS / "execute.py"))


@pytest.fixture(autouse=True)
def _kernels_find_this_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))


def said_by(notebook) -> str:
    return "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", []))


def test_every_cell_runs_and_the_file_stays_as_it_is(execute, tmp_path):
    models(tmp_path / "mine")
    real_cells(300).write_h5ad(tmp_path / "small.h5ad")
    before = (NOTEBOOKS / f"{MODEL}.ipynb").read_bytes()
    parameters = {"model_folder": "mine", "cells_file": "small.h5ad", "label": "cell_type", "wanted": "B"}
    notebook = execute["executed"](MODEL, parameters, tmp_path)
    said = said_by(notebook)
    assert "AnnData object with n_obs × n_vars = 200 × 6" in said
    assert "auroc" in said
    assert "(64, 6)" in said
    assert (tmp_path / "shared_model" / "README.md").is_file()
    assert (NOTEBOOKS / f"{MODEL}.ipynb").read_bytes() == before
    assert [c.source for c in notebook.cells] == [c.source for c in nbformat.reads(before.decode(), 4).cells]


def test_the_notebook_of_upstreams_checkpoint_runs_on_an_exported_one(execute, tmp_path):
    write_vae(tmp_path / "mine" / "vae", CELL_TYPES, DONORS)
    write_flow(tmp_path / "mine" / "flow", CELL_TYPES, DONORS)
    exported = CliRunner().invoke(
        app, ["export", str(tmp_path / "mine"), "--to", "upstream", "--out", str(tmp_path / "exported")]
    )
    assert exported.exit_code == 0, exported.output
    real_cells(300).write_h5ad(tmp_path / "small.h5ad")
    parameters = {"checkpoint": "exported/model.ckpt", "config": "exported/config.yaml", "cells_file": "small.h5ad"}
    said = said_by(execute["executed"]("upstream_checkpoint", parameters, tmp_path))
    assert "VAE and flow converted from upstream scLDM" in said
    assert "AnnData object with n_obs × n_vars = 300 × 6" in said
    assert (tmp_path / "models" / "upstream" / "flow").is_dir()


def test_parameters_that_the_notebook_does_not_take_are_refused(execute, tmp_path):
    with pytest.raises(ValueError, match="the notebook takes"):
        execute["executed"](MODEL, {"model": "mine"}, tmp_path)


def test_a_parameter_of_the_command_line_is_a_literal_a_path_or_a_text(execute):
    assert execute["parameter"]("settings={'a': 1}") == ("settings", {"a": 1})
    assert execute["parameter"]("wanted=B cell") == ("wanted", "B cell")
    assert execute["parameter"]("cells_file=x.h5ad") == ("cells_file", str(Path("x.h5ad").resolve()))


def test_the_lines_on_the_page_are_the_notebooks(execute):
    page = (DOCS / "python_api.md").read_text()
    [block] = [b.split("```")[0] for b in page.split("```python\n")[1:] if "import anndata" in b]
    cells = nbformat.read(NOTEBOOKS / f"{MODEL}.ipynb", 4).cells
    sources = "\n".join(c.source for c in cells if c.cell_type == "code")
    for line in block.splitlines():
        assert line in sources.splitlines(), f"docs/python_api.md has a line that the notebook has not: {line}"
