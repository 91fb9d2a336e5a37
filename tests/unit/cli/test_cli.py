"""The command line: quick where it should be, exit codes that scripts can trust, messages on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.workflow import runner

ROOT = Path(__file__).resolve().parents[3]
JOB = "kind: ingest\nname: demo\nsource: {type: synthetic, n_cells: 40}\n"
cli = CliRunner()


@pytest.fixture
def job(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)
    return "job.yaml"


def test_a_valid_job_exits_with_0(job):
    result = cli.invoke(app, ["validate", job, "source.n_cells=80"])
    assert result.exit_code == 0
    assert "a valid ingest job" in result.stdout


@pytest.mark.parametrize("command", ["validate", "plan", "run", "submit"])
def test_bad_input_exits_with_2_and_says_why_on_stderr(job, command):
    result = cli.invoke(app, [command, job, "source.n_cell=80"])
    assert result.exit_code == 2
    assert "did you mean `n_cells`?" in result.stderr
    assert "Traceback" not in result.output


def test_a_job_without_its_inputs_exits_with_2_and_writes_nothing(job):
    Path(job).write_text("kind: encode\nname: demo\n")
    result = cli.invoke(app, ["run", job])
    assert result.exit_code == 2
    assert "a job file of kind: train_vae" in result.stderr
    assert os.listdir() == ["job.yaml"]


def test_a_failure_exits_with_1_and_names_the_log(job, monkeypatch):
    monkeypatch.setattr(runner, "run_job", lambda *_: 1 / 0)
    result = cli.invoke(app, ["run", job])
    assert result.exit_code == 1
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "Traceback" in Path(result.stderr.split("log: ")[1].strip()).read_text()


def test_ctrl_c_exits_with_130(job, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_job", interrupted)
    assert cli.invoke(app, ["run", job]).exit_code == 130


def test_a_script_reads_the_plan_that_people_read(job):
    said = cli.invoke(app, ["plan", job]).stdout
    data = json.loads(cli.invoke(app, ["plan", job, "--json"]).stdout)
    assert data["folder"] in said
    assert data["stages"]
    for stage in data["stages"]:
        assert stage["state"] == "will run"
        assert stage["version"] in said
    assert data["sizes"]
    assert all(line in said for line in data["sizes"])


def test_the_plan_says_what_would_run(job):
    result = cli.invoke(app, ["plan", job])
    assert result.exit_code == 0
    assert "will run  first run" in result.stdout
    assert "40 cells x 1,000 genes" in result.stdout
    assert not Path("runs").exists()


def test_runs_list_of_nothing_exits_with_2(job):
    result = cli.invoke(app, ["runs", "list", "runs/demo"])
    assert result.exit_code == 2
    assert "holds no finished stage" in result.stderr


@pytest.mark.parametrize("command", [[], ["run"], ["validate"], ["plan"], ["submit"], ["runs", "list"]])
def test_every_command_explains_itself(command):
    result = cli.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    if command:
        assert "Example:" in result.stdout


def test_help_and_validate_import_nothing_heavy(job):
    code = (
        "import sys; from typer.testing import CliRunner; from pipeline.cli.app import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['validate', 'job.yaml']).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['plan', 'job.yaml']).exit_code == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'deepspeed', 'tiledbsoma', 'pandas', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert time.monotonic() - began < 15  # about one second on an idle machine


def test_a_job_file_runs_as_a_program(job, tmp_path):
    script = tmp_path / "job.yaml"
    script.write_text(f"#!/usr/bin/env -S python -m pipeline validate\n{JOB}")
    script.chmod(0o755)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    result = subprocess.run([script, "source.n_cells=80"], env=env, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_an_interpreter_without_our_libraries_is_told_what_to_do(tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").touch()
    (tmp_path / "pipeline" / "__main__.py").write_text((ROOT / "pipeline" / "__main__.py").read_text())
    bare = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        "import runpy, sys; sys.path.insert(0, '.'); runpy.run_module('pipeline')",
    ]
    code = bare[-1].replace("run_module('pipeline')", "run_module('pipeline', run_name='__main__')")
    result = subprocess.run([*bare[:-1], code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "run `make venv`" in result.stderr

    venv = tmp_path / ".venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text("#!/bin/sh\necho venv: $@\n")
    (venv / "python").chmod(0o755)
    result = subprocess.run([*bare[:-1], code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "venv: -m pipeline"
    assert "going on with" in result.stderr
