"""The wheel: built from what is committed, it holds the model and the pipeline, and works where nothing else is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
KEPT = ("scldm", "pipeline", "pyproject.toml", "README.md", "LICENSE")
pytestmark = pytest.mark.slow


def run(*words: object, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(w) for w in words], cwd=cwd, env=env, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in a copy, so that no build folder is left in the repository; setuptools is the environment's own."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in KEPT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, copy, cwd=out)
    [made] = out.glob("scldm_census-*.whl")
    return made


def test_it_holds_both_packages_their_data_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"scldm/py.typed", "scldm/api/model.py", "pipeline/report/report.html.jinja", "pipeline/cli/app.py"} <= set(
        names
    )
    assert {name.split("/")[0].split("-")[0] for name in names} == {"scldm", "scldm_census", "pipeline"}


def test_it_works_in_an_environment_of_its_own(wheel, tmp_path):
    """The wheel is installed alone; its dependencies are borrowed from here, which needs no network."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    ours = next(p for p in sys.path if p.endswith("site-packages"))
    (Path(site) / "borrowed.pth").write_text(ours + "\n")
    said = run(
        python,
        "-c",
        "import scldm, scldm.api.model; print(scldm.__file__, scldm.__version__, scldm.load.__name__)",
        cwd=tmp_path,
    )
    assert said.split()[0].startswith(site)
    version = run(tmp_path / "venv" / "bin" / "scldm", "--version", cwd=tmp_path).split()[-1]
    assert said.split()[1:] == [version, "load"]
    help_text = run(tmp_path / "venv" / "bin" / "scldm", "--help", cwd=tmp_path)
    assert "init" in help_text
