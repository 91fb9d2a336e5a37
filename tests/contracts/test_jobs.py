"""Every job file in the repository runs as a program, validates, and the single jobs are the parts of the line."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from pipeline.config.io.loader import load_job
from pipeline.config.job import STAGES, stage_configs

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
    job = load_job(path)
    assert job.kind in stage_configs(job) or job.kind == "pipeline"


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


DATA_SETS = {
    "census": ["cell_type", "tissue_general"],
    "dentate_gyrus": ["clusters"],
    "tabula_muris": ["tissue"],
    "hlca": ["cell_type"],
    "parse1m": ["cell_type", "cytokine"],
    "replogle": ["cell_line", "gene"],
}


@pytest.mark.parametrize(("folder", "labels"), DATA_SETS.items())
def test_the_papers_data_sets_have_jobs_that_say_where_to_get_them(folder, labels):
    path = ROOT / "jobs" / folder / "ingest.yaml"
    job = load_job(path)
    assert job.labels == labels
    comments = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "Expect:" in comments
    assert "Get it:" in comments or "s3://" in comments
    if job.source.type == "census":  # a preset that moved would not be the same data set
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", job.source.version)
