"""Every job file in the repository runs as a program, validates, and the single jobs are the parts of the line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pipeline.config_io import load_job
from pipeline.job import STAGES, stage_configs

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "jobs").rglob("*.yaml"))
SHEBANG = "#!/usr/bin/env -S python -m pipeline run"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_a_job_for_the_line_and_for_every_stage():
    assert {p.stem for p in JOBS} >= {"demo", *STAGES}


@pytest.mark.parametrize("path", JOBS, ids=name)
def test_a_job_file_is_a_program(path):
    assert path.read_text().splitlines()[0] == SHEBANG
    if not os.access(path, os.X_OK):  # a file system without modes: what git records counts
        entry = subprocess.run(["git", "ls-files", "-s", path], cwd=ROOT, capture_output=True, text=True, check=True)
        assert entry.stdout.startswith("100755"), f"git update-index --chmod=+x {name(path)}"


@pytest.mark.parametrize("path", JOBS, ids=name)
def test_a_job_file_validates(path):
    load_job(path)


@pytest.mark.parametrize("path", JOBS, ids=name)
def test_a_job_file_opens_with_what_it_is_and_how_to_run_it(path):
    comments = [line for line in path.read_text().splitlines()[1:] if line.startswith("#")]
    assert len(comments) >= 3
    assert any("Run:" in line for line in comments)


@pytest.mark.parametrize("stage", STAGES)
def test_the_single_jobs_are_the_parts_of_the_demo(stage):
    demo, single = load_job(ROOT / "jobs" / "demo.yaml"), load_job(ROOT / "jobs" / f"{stage}.yaml")
    assert (single.name, single.output, single.seed) == (demo.name, demo.output, demo.seed)
    for held, config in stage_configs(single).items():
        assert config == stage_configs(demo)[held]
