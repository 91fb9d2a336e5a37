"""Who may import whom, read from the source: nothing is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEVER_IN_SCLDM = {"pipeline", "ray", "mlflow", "deepspeed", "tiledbsoma", "click", "typer"}
ONLY_IN = {
    "tiledbsoma": ("pipeline/data/soma/store.py", "pipeline/data/soma/write.py", "pipeline/inference/export/soma.py"),
    "deepspeed": ("pipeline/training/engine/deepspeed.py",),
    "mlflow": (
        "pipeline/tracking/mlflow_runs/client.py",
        "pipeline/tracking/mlflow_runs/delivery.py",
        "pipeline/tracking/mlflow_runs/register.py",
        "pipeline/tracking/comparison/fetch.py",
        "pipeline/inference/export/mlflow_model.py",
    ),
    "cellarium": ("pipeline/data/sources/h5ad.py",),
    "cellxgene_census": ("pipeline/data/sources/census.py",),
}
SCLDM = sorted((ROOT / "scldm").rglob("*.py"))
PIPELINE = sorted((ROOT / "pipeline").rglob("*.py"))


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """First names of what a module imports, anywhere in it or where it is loaded."""
    return set(_imports(ast.parse(path.read_text()), top_level_only))


def _imports(tree: ast.AST, top_level_only: bool) -> Iterator[str]:
    for node in tree.body if top_level_only and isinstance(tree, ast.Module) else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SCLDM, ids=name)
def test_the_model_knows_no_orchestration(path):
    assert not imported(path) & NEVER_IN_SCLDM


@pytest.mark.parametrize(("library", "home"), ONLY_IN.items(), ids=list(ONLY_IN))
def test_a_heavy_library_is_imported_in_one_module(library, home):
    assert {name(p) for p in [*SCLDM, *PIPELINE] if library in imported(p)} <= set(home)


LIGHT = [
    *(ROOT / "pipeline" / "cli").rglob("*.py"),
    *(ROOT / "pipeline" / "config").rglob("*.py"),
    *(ROOT / "pipeline" / "core").rglob("*.py"),
    *(ROOT / "pipeline" / "cluster").rglob("*.py"),
    *(ROOT / "pipeline" / "planning").rglob("*.py"),
    *(ROOT / "pipeline" / "workflow").rglob("*.py"),
    *(ROOT / "pipeline" / "tracking").rglob("*.py"),
]


@pytest.mark.parametrize("path", LIGHT, ids=name)
def test_the_command_line_loads_nothing_heavy(path):
    heavy = {"torch", "ray", "mlflow", "deepspeed", "tiledbsoma", "anndata", "scanpy", "pandas", "numpy"}
    assert not imported(path, top_level_only=True) & heavy
