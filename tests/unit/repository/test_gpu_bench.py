"""`make gpu` is rehearsed: every part at tiny sizes on the CPU, and what comes of parts that fail."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch
from gpu_bench import main, markdown, parts_of
from gpu_parts import steps
from gpu_parts.plan import Budget, Outcome, Part, Skipped, run_parts
from gpu_parts.programs import run
from gpu_parts.sizes import rehearsal_sizes

IN_PROCESS = ("vae_steps", "flow_steps", "inference")
PROGRAMS = ("tests", "ranks", "demo")


def rehearse(tmp_path, *parts: str) -> dict:
    words = ["--rehearse", "--json", str(tmp_path / "gpu.json"), *(w for p in parts for w in ("--part", p))]
    assert main(words) == 0
    assert "| part | state |" in (tmp_path / "gpu.md").read_text()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [p["name"] for p in found["parts"]] == list(parts)
    assert all(p["state"] == "done" for p in found["parts"])
    return found


def test_every_part_in_this_process(tmp_path):
    names = {row["name"] for row in rehearse(tmp_path, *IN_PROCESS)["rows"]}
    for model in ("tiny", "tiny_dit"):
        for precision in ("fp32", "tf32", "bf16"):
            assert {f"{model}.step.{precision}.{form}.4" for form in ("eager", "compiled")} <= names
    assert {f"tiny.{what}.{p}" for what in ("encode", "generate") for p in ("fp32", "tf32", "bf16")} <= names


@pytest.mark.multiprocess
def test_every_part_that_starts_programs(tmp_path):
    """Two ranks over gloo in place of NCCL; tests are collected and the demo's job is validated."""
    names = {row["name"] for row in rehearse(tmp_path, *PROGRAMS)["rows"]}
    assert {f"zero{stage}.{p}.2.step" for stage in range(4) for p in ("fp32", "bf16")} <= names
    assert "all_reduce" in names


def test_all_parts_are_rehearsed():
    assert sorted(p.name for p in parts_of(rehearsal_sizes())) == sorted([*IN_PROCESS, *PROGRAMS])


def test_a_form_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    whole = steps._flow_step

    def fails(form, sizes):
        if form.precision == "tf32":
            raise RuntimeError("no such kernel")
        if form.compiled:
            raise torch.cuda.OutOfMemoryError
        return whole(form, sizes)

    monkeypatch.setattr(steps, "_flow_step", fails)
    words = ["--rehearse", "--json", str(tmp_path / "gpu.json"), "--part", "flow_steps"]
    assert main(words) == 1
    [part] = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert part["state"] == "failed"
    assert len(part["errors"]) == 2
    assert "tiny_dit.tf32.eager.4: RuntimeError: no such kernel" in part["errors"][0]
    assert part["notes"] == ["tiny_dit.bf16.compiled.4: out of memory", "tiny_dit.fp32.compiled.4: out of memory"]
    assert "no such kernel" in capsys.readouterr().err


def test_a_part_that_breaks_or_cannot_run_leaves_the_others_and_their_time_to_them():
    seen = {}

    def breaks(outcome, budget):
        seen["first"] = budget.left()
        raise ValueError("broken")

    def cannot(outcome, budget):
        raise Skipped("one GPU only")

    def works(outcome, budget):
        seen["last"] = budget.left()

    parts = [Part("a", 1, breaks), Part("b", 1, cannot), Part("c", 1, works)]
    found = run_parts(parts, 30, lambda line: None)
    assert [(o.state, o.why.partition(" at ")[0]) for o in found] == [
        ("failed", "ValueError: broken"), ("skipped", "one GPU only"), ("done", ""),
    ]  # fmt: skip
    assert seen["first"] == pytest.approx(10, abs=1)
    assert seen["last"] == pytest.approx(30, abs=1)
    page = markdown(found, {"torch": "t", "cuda": None})
    assert "| b | skipped | 0 | one GPU only |" in page


def test_forms_that_are_not_reached_in_time_are_listed():
    outcome = Outcome("vae_steps")
    [part] = [p for p in parts_of(rehearsal_sizes()) if p.name == "vae_steps"]
    part.work(outcome, type("Over", (), {"left": lambda self: -1.0})())
    assert outcome.rows == []
    assert len(outcome.notes) == 6
    assert all("not reached in time" in note for note in outcome.notes)


def test_a_program_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    child = f"import time, pathlib; time.sleep(6); pathlib.Path({str(tmp_path / 'lived')!r}).touch()"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    code, said = run([sys.executable, "-c", parent], Budget(2))
    assert code == 124
    assert said.endswith("ended after 2 s")
    time.sleep(6)
    assert not (tmp_path / "lived").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and would be measured")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path, capsys):
    assert main(["--json", str(tmp_path / "gpu.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()
