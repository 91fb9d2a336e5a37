"""Row C12: what earlier versions wrote still loads, with the numbers that it gave them (`tests/golden/make.py`)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config.io.loader import load_job, resolved_yaml
from pipeline.config.io.renamed import KINDS
from pipeline.training.checkpoints.manifest import newest
from pipeline.training.engine.state_files import Shards

GOLDEN = Path(__file__).resolve().parents[3] / "golden"
VERSIONS = sorted(p for p in GOLDEN.iterdir() if p.is_dir() and p.name != "__pycache__")
pytestmark = pytest.mark.row("C12")
versions = pytest.mark.parametrize("folder", VERSIONS, ids=lambda p: p.name)


def maker() -> Any:
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_golden_files_and_they_are_small():
    assert [p.name for p in VERSIONS][:2] == ["0.1.0", "0.2.0"]
    assert sum(f.stat().st_size for v in VERSIONS for f in v.rglob("*") if f.is_file()) < 1_000_000 * len(VERSIONS)


@versions
def test_models_give_the_same_numbers(folder):
    expected, found = json.loads((folder / "expected.json").read_text()), maker().numbers(folder)
    for name in ("genes", "digest", "sizes"):
        assert found[name] == expected[name]
    for name in ("latents", "mu", "nll", "velocity", "velocity_raw"):
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected[name]), rtol=1e-4, atol=1e-5)
    kinds = {} if folder.name == "0.1.0" else {"nb_cell", "gaussian", "lora", "started"}  # what 0.1.0 did not know
    assert found.get("models", {}).keys() == expected.get("models", {}).keys() == set(kinds)
    for kind in kinds:
        for name, values in expected["models"][kind].items():
            own = torch.tensor(found["models"][kind][name])
            torch.testing.assert_close(own, torch.tensor(values), rtol=1e-4, atol=1e-5, msg=f"{kind} {name}")


@versions
def test_a_run_resumes_from_its_checkpoint(folder):
    found, rejected = newest(folder / "run")
    assert rejected == []
    assert found is not None
    position = found.position
    assert (position.step, position.epoch, position.offset, position.world_size) == (40, 1, 8, 1)
    assert (found.metrics, found.more) == ({"val/loss": 1.25}, {"tracker": "run"})
    shards = Shards(found.folder)
    for key, value in maker().state().items():
        field, _, name = key.split("/")
        if field == "weight":
            torch.testing.assert_close(shards.weight(name, value.shape), value, rtol=0, atol=0)


@versions
def test_a_job_means_what_it_meant(folder):
    """Every setting that it wrote out is still known and has the value that it had; new ones may have come."""
    then, now = yaml.safe_load((folder / "job.yaml").read_text()), load_job(folder / "job.yaml")
    then["kind"] = KINDS.get(then["kind"], then["kind"])
    assert differing(then, yaml.safe_load(resolved_yaml(now))) == []


def differing(old: Any, new: Any, at: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [p for k, v in old.items() for p in differing(v, new.get(k, "(gone)"), f"{at}.{k}")]
    return [] if old == new else [f"{at}: {old!r} became {new!r}"]
