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
MODULES = {"cellarium-ml": "cellarium", "umap-learn": "umap", "cellxgene-census": "cellxgene_census"}
PIPELINE = [re.split(r"[\[>=<~]", x)[0] for x in PYPROJECT["optional-dependencies"]["pipeline"]]

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
import scldm.api.scoring
scldm.Model.from_pretrained(model.save_pretrained(root / "saved"))
import scldm.checkpoints.convert.convert, scldm.cells.cells, scldm.api.presets
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)


def blocked(*names: str) -> str:
    return BLOCKED.format(root=str(ROOT), helpers=str(ROOT / "tests"), blocked=set(names))


def test_the_model_works_without_anything_of_the_pipeline(tmp_path):
    modules = {MODULES.get(name, name) for name in PIPELINE} | {"pipeline", "click"}
    assert {"ray", "mlflow", "deepspeed", "tiledbsoma", "typer"} <= modules
    done = run(blocked(*modules) + WORKS.format(folder=str(tmp_path)))
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_the_model_needs_is_what_it_asks_for():
    imported: set[str] = set()
    for path in (ROOT / "scldm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            imported |= {name.partition(".")[0] for name in names}
    asked = {re.split(r"[\[>=<~]", x)[0] for x in PYPROJECT["dependencies"]}
    modules = {"scikit-learn": "sklearn", "scikit-misc": "skmisc", "pyyaml": "yaml"}
    foreign = imported - set(sys.stdlib_module_names) - {"scldm", "__future__", "triton"}  # triton is asked for by name
    assert foreign == {modules.get(x, x) for x in asked}


def test_the_developer_and_the_cluster_get_the_pipeline_too():
    assert "scldm[pipeline]" in PYPROJECT["optional-dependencies"]["dev"]
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
