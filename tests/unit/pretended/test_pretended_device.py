"""Every path of the package on a pretended CUDA device, and what its steps ask of one. No GPU, no Ray, one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.pretended import library

ROOT = Path(__file__).resolve().parents[3]
BUDGETS = ROOT / "tests" / "helpers" / "pretended" / "budgets.json"
LOWER = "python benchmarks/gpu_budgets.py --write-budgets"
REASON = library.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def found(tmp_path_factory, pytestconfig) -> dict[str, Any]:
    """What the program found, run once for all tests."""
    guard = library.build(Path(pytestconfig.cache.mkdir("pretended_device")))
    root = tmp_path_factory.mktemp("pretended")
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "helpers.pretended.program", guard, root, root / "found.json"]
    done = subprocess.run(command, env=here, cwd=root, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / "found.json").read_text())


def all_passed(found: dict[str, Any], group: str, at_least: int) -> None:
    paths = found["paths"][group]
    failed = [f"{name}: {path['error']}" for name, path in paths.items() if path["error"] is not None]
    assert not failed, f"{len(failed)} of {len(paths)} paths fail on a CUDA device:\n" + "\n".join(failed)
    assert len(paths) >= at_least
    unused = [name for name, path in paths.items() if path["launches"] == 0]
    assert not unused, f"paths that never used the device: {', '.join(unused)}"


def test_a_vae_of_every_input_head_and_choice_of_genes_trains_on_a_cuda_device(found):
    all_passed(found, "vae", 44)


def test_a_flow_of_every_strategy_path_and_kind_of_label_trains_and_is_solved_on_a_cuda_device(found):
    all_passed(found, "flow", 44)


def test_the_loop_trains_and_saves_on_a_cuda_device_under_every_zero_stage(found):
    all_passed(found, "loop", 9)


def test_the_actors_of_every_job_work_on_a_cuda_device(found):
    all_passed(found, "job", 19)


def test_every_method_of_a_notebooks_model_works_on_a_cuda_device(found):
    all_passed(found, "notebook", 29)


# ---- budgets -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", json.loads(BUDGETS.read_text()))
def test_a_step_asks_no_more_of_a_gpu_than_its_budget(found, step):
    measured, budget = found["steps"][step], json.loads(BUDGETS.read_text())[step]
    over = {k: (n, budget[k]) for k, n in measured["totals"].items() if n > budget[k]}
    where = [f"  {kind} {n} x {line}" for kind in ("syncs", "copies") for line, n in measured[kind].items()]
    assert not over, (
        f"{step} asks for more than its budget, as (now, budget): {over}\n" + "\n".join(where)
        + f"\nTake out what was added. If it must be, or if a step has become cheaper, write new budgets: {LOWER}"
    )  # fmt: skip


def test_every_step_has_a_budget(found):
    assert set(found["steps"]) == set(json.loads(BUDGETS.read_text()))


# ---- the test of the test ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("a tensor left on the CPU", "Expected all tensors to be on the same device"),
        ("frequencies made on the CPU", "Expected all tensors to be on the same device"),
        ("a generator of the CPU", "Expected a 'cuda' device type for generator"),
        ("numpy() of a CUDA tensor", "numpy() is not supported"),
        ("latents that stay on the device", "numpy() is not supported"),
    ],
)
def test_a_planted_mistake_that_a_gpu_refuses_is_refused(found, fault, message):
    assert message in found["faults"][fault]["error"]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("an added item()", "syncs"), ("an added boolean mask", "syncs"), ("an added index on the CPU", "copies"),
        ("an added copy to the device", "copies"), ("an added copy to the device", "syncs"),
        ("an added kernel", "launches"),
    ],
)  # fmt: skip
def test_a_planted_mistake_that_only_costs_time_is_counted(found, fault, kind):
    clean, planted = (found["faults"][x]["record"] for x in ("no mistake", fault))
    assert clean == found["steps"]["vae_step@1024_genes"]["totals"]
    assert planted[kind] > clean[kind]


# ---- the guard -----------------------------------------------------------------------------------------------------
def test_the_guard_is_refused_once_torch_is_imported(tmp_path):
    import torch  # noqa: F401

    with pytest.raises(RuntimeError, match="before torch is imported"):
        library.load(tmp_path / "libguard.so")


def test_a_guard_that_does_not_compile_says_what_the_compiler_said(tmp_path, monkeypatch):
    broken = tmp_path / "guard.cpp"
    broken.write_text("#error this is no guard\n")
    monkeypatch.setattr(library, "SOURCE", broken)
    with pytest.raises(RuntimeError, match="this is no guard"):
        library.build(tmp_path / "out")


def test_without_a_compiler_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    assert library.missing() == "a pretended CUDA device needs g++ (apt-get install g++)"


def test_without_headers_of_torch_the_reason_names_the_one_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "torch_folder", lambda: tmp_path)
    assert str(tmp_path / library.HEADER) in str(library.missing())
