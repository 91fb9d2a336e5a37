"""The distribution has a name of its own, and upstream's, whose package is called `scldm` too, is noticed beside it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
OURS = "Name: scldm-census\nVersion: 0.1.0\n"
UPSTREAM = "Name: scldm\nVersion: 0.0.0\n"


CHANGED = f"""
import importlib.util as u
sys.modules.update({{n: type(sys)(n) for n in ("scldm.errors", "pipeline.cli.doctor.finding")}})
sys.modules["scldm.errors"].DISTRIBUTION = "scldm-census"
sys.modules["pipeline.cli.doctor.finding"].Finding = sys.modules["pipeline.cli.doctor.finding"].Requirements = None
spec = u.spec_from_file_location("packages", {str(ROOT / "pipeline/cli/doctor/packages.py")!r})
module = u.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.changed_files())
"""


def install(site: Path, name: str, about: str, files: dict[str, str]) -> None:
    """Write files and their record, as pip does; files that are there are overwritten."""
    record = []
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
        digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        record.append(f"{path},sha256={digest},{len(text)}\n")
    folder = site / f"{name.replace('-', '_')}-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + about)
    (folder / "RECORD").write_text("".join(record))


def ours() -> dict[str, str]:
    names = ("scldm/__init__.py", "scldm/errors.py", "scldm/text.py", "pipeline/__init__.py",
             "pipeline/__main__.py")  # fmt: skip
    return {name: (ROOT / name).read_text() for name in names}


def run(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that sees one site-packages; the working folder and our environment are left out."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    place = f"import sys; sys.path[:] = [{str(site)!r}, *[p for p in sys.path if p and 'site-packages' not in p]]\n"
    words = [sys.executable, "-S", "-c", place + code]
    return subprocess.run(words, cwd=site, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_ours_alone_says_nothing(tmp_path):
    install(tmp_path, "scldm-census", OURS, ours())
    done = run(tmp_path, "import scldm; print(scldm.__version__)")
    assert (done.stdout, done.stderr) == ("0.1.0\n", "")
    assert run(tmp_path, CHANGED).stdout == "[]\n"


def test_ours_over_upstream_warns_at_import(tmp_path):
    install(tmp_path, "scldm", UPSTREAM, {"scldm/__init__.py": "", "scldm/vae.py": ""})
    install(tmp_path, "scldm-census", OURS, ours())
    done = run(tmp_path, "import scldm")
    assert done.returncode == 0
    assert "two distributions share" in done.stderr
    assert "pip uninstall scldm scldm-census" in done.stderr


def test_an_older_version_of_this_project_is_not_called_upstreams(tmp_path):
    install(tmp_path, "scldm", UPSTREAM, {"scldm/__init__.py": "", "scldm/gone.py": ""})
    (tmp_path / "scldm-0.dist-info" / "entry_points.txt").write_text("[scldm.train]\npipeline = a:b\n")
    install(tmp_path, "scldm-census", OURS, ours())
    said = run(tmp_path, "import scldm").stderr
    assert "scldm 0.0.0 (its name up to 0.2)" in said
    assert "pip uninstall scldm scldm-census" in said


def test_upstream_over_ours_ends_the_command_line_and_is_found_in_the_files(tmp_path):
    install(tmp_path, "scldm-census", OURS, ours())
    install(tmp_path, "scldm", UPSTREAM, {"scldm/__init__.py": "raise SystemExit('imported')", "scldm/text.py": ""})
    done = run(tmp_path, "from pipeline.__main__ import console; console()")
    assert done.returncode == 2
    assert f"{tmp_path}/scldm/__init__.py is not of this project" in done.stderr
    assert run(tmp_path, CHANGED).stdout == "['scldm/__init__.py', 'scldm/text.py']\n"


@pytest.mark.parametrize("files", [{"elsewhere/__init__.py": ""}, {"__editable___scldm_finder.py": ""}])
def test_a_distribution_of_the_name_without_files_in_our_folder_is_no_problem(tmp_path, files):
    install(tmp_path, "scldm", UPSTREAM, files)
    install(tmp_path, "scldm-census", OURS, ours())
    assert run(tmp_path, "import scldm").stderr == ""
