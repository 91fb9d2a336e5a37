"""A fault triggers at the occurrence, worker and step that it names and at no other; by default none does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.core import faults
from pipeline.core.fault_points import POINTS
from pipeline.core.faults import FaultError, arm, fault_point, parse


@pytest.fixture(autouse=True)
def disarmed():
    yield
    arm("")


def test_a_fault_happens_at_its_time_and_only_then():
    arm("generate.before_record:n=2:raise")
    fault_point("generate.before_record")
    fault_point("generate.before_rename")
    with pytest.raises(FaultError, match=r"generate.before_record, time 2"):
        fault_point("generate.before_record")
    fault_point("generate.before_record")


def test_a_fault_of_one_worker_is_no_other_workers(monkeypatch):
    arm("checkpoint.after_shard:rank=1:n=2:raise")
    for _ in range(3):
        fault_point("checkpoint.after_shard")
    monkeypatch.setenv("RANK", "1")
    fault_point("checkpoint.after_shard")
    with pytest.raises(FaultError):
        fault_point("checkpoint.after_shard")


def test_a_fault_of_a_step_waits_for_that_step():
    arm("training.before_step:step=7:raise")
    for step in (5, 6):
        fault_point("training.before_step", step=step)
    with pytest.raises(FaultError):
        fault_point("training.before_step", step=7)


def test_several_faults_count_each_for_itself():
    arm("cache.before_rename:n=2:raise, cache.before_record:raise")
    fault_point("cache.before_rename")
    with pytest.raises(FaultError, match="before_record"):
        fault_point("cache.before_record")
    with pytest.raises(FaultError, match="before_rename"):
        fault_point("cache.before_rename")


def test_the_environment_is_read_once(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "generate.before_record:raise")
    monkeypatch.setattr(faults, "_armed", None)
    with pytest.raises(FaultError):
        fault_point("generate.before_record")
    monkeypatch.setenv(faults.VARIABLE, "generate.before_rename:raise")
    fault_point("generate.before_rename")


@pytest.mark.parametrize(
    ("action", "code"), [("kill", -signal.SIGKILL), ("term", -signal.SIGTERM), ("exit=7", 7), ("sleep=0.01", 0)]
)
def test_what_an_action_does_to_its_process(action, code):
    program = "from pipeline.core.faults import fault_point; fault_point('stage.before_run')"
    environment = {**os.environ, faults.VARIABLE: f"stage.before_run:{action}"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == code


def test_a_process_that_is_stopped_answers_nobody_and_does_not_end():
    program = "from pipeline.core.faults import fault_point; fault_point('stage.before_run')"
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, faults.VARIABLE: "stage.before_run:stop"}
    )
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("generate.nowhere:kill", "no fault point 'generate.nowhere'"),
        ("generate.before_recrod:kill", "did you mean 'generate.before_record'?"),
        ("generate.before_record", "names no action"),
        ("generate.before_record:n=0:kill", "'n=0'"),
        ("generate.before_record:n=1:n=2:kill", "'n=2'"),
        ("generate.before_record:explode", "'explode'"),
        ("generate.before_record:exit=1.5", "'exit=1.5'"),
        ("generate.before_record:kill=9", "'kill=9'"),
        ("generate.before_record:step=3:kill", "generate.before_record has no step"),
    ],
)
def test_a_fault_that_cannot_happen_is_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(text)


def test_every_command_reports_all_problems_together_with_exit_code_2(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "stage.nowhere:kill,stage.before_run:boom")
    done = CliRunner().invoke(app, ["validate", "jobs/demo.yaml"])
    assert done.exit_code == 2
    assert "'stage.nowhere'" in done.stderr
    assert "'boom'" in done.stderr
    assert "`scldm faults` lists the points" in done.stderr


def test_the_command_lists_every_point_even_if_the_variable_is_malformed(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "stage.nowhere:kill")
    done = CliRunner().invoke(app, ["faults", "--json"])
    assert done.exit_code == 0
    listed = json.loads(done.stdout)
    assert [p["name"] for p in listed] == list(POINTS)
    assert {"name", "where", "what", "has_step"} == set(listed[0])
    text = CliRunner().invoke(app, ["faults"]).stdout
    assert all(name in text for name in POINTS)


def test_a_point_costs_next_to_nothing_without_an_active_fault():
    arm("")
    began = time.process_time()
    for _ in range(100_000):
        fault_point("training.before_step", step=1)
    assert (time.process_time() - began) / 100_000 < 5e-6  # seconds
