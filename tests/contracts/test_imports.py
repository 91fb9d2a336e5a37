"""Which module may import which, read from the source: nothing is imported here.

`docs/architecture.md` explains the rooms; the picture there is drawn from the same reading (`docs/architecture.py`).
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
architecture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architecture)

NEVER_IN_SCLDM = {"pipeline", "ray", "mlflow", "deepspeed", "tiledbsoma", "click", "typer"}
ONLY_IN = {
    "tiledbsoma": ("pipeline/data/soma/library.py",),
    "deepspeed": ("pipeline/training/engine/deepspeed.py",),
    "mlflow": (
        "pipeline/config/paths/remote_models.py",
        "pipeline/tracking/mlflow_runs/client.py",
        "pipeline/tracking/mlflow_runs/delivery.py",
        "pipeline/tracking/mlflow_runs/register.py",
        "pipeline/tracking/comparison/fetch.py",
        "pipeline/inference/export/mlflow_model.py",
    ),
    "cellarium": ("pipeline/data/sources/h5ad.py",),
    "cellxgene_census": ("pipeline/data/sources/census.py",),
}
LIGHT_ROOMS = ("cli", "config", "core", "cluster", "planning", "workflow", "tracking")
HEAVY = {"torch", "ray", "mlflow", "deepspeed", "tiledbsoma", "anndata", "scanpy", "pandas", "numpy"}
MOST_NAMES = 14  # of a folder: a dozen or so, and __init__.py
SCLDM = sorted((ROOT / "scldm").rglob("*.py"))
PIPELINE = sorted((ROOT / "pipeline").rglob("*.py"))
FOLDERS = sorted({p.parent for p in [*SCLDM, *PIPELINE]})


@pytest.fixture(scope="module")
def graph():
    return architecture.import_graph(ROOT)


@cache
def libraries(path: Path, *, top_level_only: bool = False) -> set[str]:
    """First names of what a module imports, anywhere in it or where it is loaded."""
    tree = ast.parse(path.read_text())
    return {name.partition(".")[0] for name in architecture.imported_names(tree, top_level_only=top_level_only)}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_modules_import_each_other_in_a_circle(graph):
    assert architecture.circles(graph) == []


def test_rooms_import_only_rooms_below_them(graph):
    assert architecture.upward_imports(graph) == []


def test_every_folder_is_a_room_of_the_plan():
    for package in ("pipeline", "scldm"):
        rooms = {p.name for p in (ROOT / package).iterdir() if p.is_dir() and p.name != "__pycache__"}
        assert {f"{package}.{room}" for room in rooms} == {r for r in architecture.PURPOSE if r.startswith(package)}


def test_the_picture_shows_the_rooms_as_they_are():
    assert architecture.PICTURE.read_text() == architecture.picture(ROOT), "run: python docs/architecture.py"


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_a_folder_has_about_a_dozen_names(folder):
    names = [p for p in folder.iterdir() if p.name != "__pycache__" and (p.is_dir() or p.suffix == ".py")]
    assert len(names) <= MOST_NAMES


@pytest.mark.parametrize("path", SCLDM, ids=name)
def test_the_model_knows_no_orchestration(path):
    assert not libraries(path) & NEVER_IN_SCLDM


@pytest.mark.parametrize(("library", "home"), ONLY_IN.items(), ids=list(ONLY_IN))
def test_a_heavy_library_is_imported_in_few_modules(library, home):
    assert {name(p) for p in [*SCLDM, *PIPELINE] if library in libraries(p)} <= set(home)


@pytest.mark.parametrize("room", LIGHT_ROOMS)
def test_the_command_line_loads_nothing_heavy(room):
    heavy = {name(p): found for p in (ROOT / "pipeline" / room).rglob("*.py")
             if (found := libraries(p, top_level_only=True) & HEAVY)}  # fmt: skip
    assert heavy == {}


def test_circles_and_upward_imports_would_be_found():
    graph = {"pipeline.core.a": {"pipeline.cli.b"}, "pipeline.cli.b": {"pipeline.core.a"}}
    assert architecture.circles(graph) == [["pipeline.cli.b", "pipeline.core.a"]]
    assert architecture.upward_imports(graph) == [("pipeline.core.a", "pipeline.cli.b")]
