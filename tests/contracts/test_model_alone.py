"""`pip install scldm` is the model: it imports and works where nothing of the pipeline is installed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Names that are imported by what is installed under another name.
MODULES = {"cellarium-ml": "cellarium", "umap-learn": "umap", "cellxgene-census": "cellxgene_census",
           "scikit-learn": "sklearn", "scikit-misc": "skmisc", "huggingface-hub": "huggingface_hub",
           "pyyaml": "yaml"}  # fmt: skip
EXTRAS = PYPROJECT["optional-dependencies"]
OF_THE_MODEL = ("cells", "hub", "plot", "score", "upstream")  # extras of the model alone, which the pipeline brings too


def requested(requirements: list[str]) -> list[str]:
    found = [re.split(r"[\[>=<~]", x)[0] for x in requirements]
    return [x for x in found if x != PYPROJECT["name"]]


PIPELINE = requested(EXTRAS["pipeline"])
OPTIONAL = {MODULES.get(x, x) for extra in OF_THE_MODEL for x in requested(EXTRAS[extra])}

BLOCKED = """
import sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {helpers!r})
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
sys.meta_path.insert(0, Blocker())
"""
WORKS = """
from pathlib import Path
import anndata, numpy as np, pandas as pd
from helpers.models.small_models import CELL_TYPES, GENES, write_flow, write_vae
import scldm
root = Path({folder!r})
write_vae(root / "vae", CELL_TYPES, genes_seq_len=None); write_flow(root / "flow", CELL_TYPES)
model = scldm.load(root)
counts = np.random.default_rng(0).poisson(2.0, (80, 6))
adata = anndata.AnnData(counts.astype(np.float32), var=pd.DataFrame(index=GENES))
assert model.encode(adata).obsm["X_scldm"].shape == (80, 12)
cells = model.generate({{"cell_type": "B"}}, n=80)
assert cells.shape == model.reconstruct(adata).shape == (80, 6)
assert model.log_likelihood(adata, flow=True).notna().all().all()
moved = model.perturb(adata, {{"cell_type": "NK"}}, unknown_labels="none")
assert moved.shape == (80, 6)
scldm.Model.from_pretrained(model.save_pretrained(root / "saved"))
import scldm.api.presets
{then}
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)


def blocked(*names: str) -> str:
    return BLOCKED.format(root=str(ROOT), helpers=str(ROOT / "tests"), blocked=set(names))


def test_the_model_works_without_anything_of_the_pipeline(tmp_path):
    modules = {MODULES.get(name, name) for name in PIPELINE} | {"pipeline", "click"}
    assert {"ray", "mlflow", "deepspeed", "tiledbsoma", "typer"} <= modules
    then = "import scldm.api.scoring, scldm.checkpoints.convert.convert, scldm.cells.cells"
    done = run(blocked(*modules) + WORKS.format(folder=str(tmp_path), then=then))
    assert done.returncode == 0, done.stderr[-2000:]


SAID = """
import importlib
for name, module in {modules!r}.items():
    try:
        importlib.import_module(module)
    except ImportError as error:
        assert f"scldm-census[{{name}}]" in str(error), str(error)
    else:
        raise SystemExit(module + " was imported")
try:
    scldm.score
except ImportError as error:
    assert "scldm.score, Model.map and the metrics: sklearn is not installed" in str(error)
"""


def test_the_model_works_without_its_extras_and_names_the_one_that_is_missing(tmp_path):
    assert {"sklearn", "skmisc", "matplotlib", "umap", "omegaconf", "yaml", "pyarrow", "huggingface_hub"} == OPTIONAL
    modules = {
        "cells": "scldm.cells.cells", "score": "scldm.api.scoring", "upstream": "scldm.checkpoints.convert.convert",
    }  # fmt: skip
    done = run(blocked(*OPTIONAL - {"yaml"}) + WORKS.format(folder=str(tmp_path), then=SAID.format(modules=modules)))
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_pipeline_brings_every_extra_of_the_model():
    assert f"{PYPROJECT['name']}[{','.join(OF_THE_MODEL)}]" in EXTRAS["pipeline"]
    from scldm.errors import DISTRIBUTION
    from scldm.errors import EXTRAS as EXPLAINED

    assert PYPROJECT["name"] == DISTRIBUTION
    assert tuple(EXPLAINED) == OF_THE_MODEL


def test_what_the_model_needs_is_what_it_asks_for():
    imported: set[str] = set()
    for path in (ROOT / "scldm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            imported |= {name.partition(".")[0] for name in names}
    asked = {MODULES.get(x, x) for x in requested(PYPROJECT["dependencies"])} | OPTIONAL
    foreign = imported - set(sys.stdlib_module_names) - {"scldm", "__future__", "triton"}  # triton is asked for by name
    assert foreign == asked


def test_the_developer_and_the_cluster_get_the_pipeline_too():
    assert f"{PYPROJECT['name']}[pipeline]" in EXTRAS["dev"]
    for file in ("cluster/setup.sh", "cluster/Dockerfile"):
        assert "'.[pipeline]'" in (ROOT / file).read_text(), file


@pytest.mark.parametrize("name", ["typer", "ray"])
def test_the_command_without_the_pipeline_says_how_to_get_it(name):
    module, function = PYPROJECT["scripts"]["scldm"].split(":")
    code = (
        "import importlib.util as u, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nreal = u.find_spec\n"
        f"u.find_spec = lambda n, *a: None if n == {name!r} else real(n, *a)\n"
        f"from {module} import {function}; {function}()"
    )
    done = run(code)
    assert done.returncode == 2
    assert "pip install '.[pipeline]'" in done.stderr
    assert name in done.stderr
