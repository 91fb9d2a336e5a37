"""A job's stages run once, rerun when what they depend on changes, and leave no manifest when they fail."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.models.small_models import write_vae

import pipeline.core.lock
from pipeline.config.io.loader import load_job
from pipeline.config.job import STAGES
from pipeline.core import faults
from pipeline.core.lock import LOCK, stage_lock
from pipeline.core.manifest import Manifest, newest_manifest, write_manifest
from pipeline.tracking import tracker as tracking
from pipeline.workflow import runner, schedule
from pipeline.workflow.changes import versions_of_0_1
from pipeline.workflow.folders import output_root, pipeline_folder
from pipeline.workflow.schedule import resolve
from scldm.errors import InputError

LINE = "kind: pipeline\nname: demo\ningest: {source: {type: synthetic}}\ngenerate: {per_label: {cell_type: 5}}\n"


class Stages:
    """Stage functions that count their calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: dict[str, BaseException] = {}

    def function(self, stage: str):
        def run(config, context):
            self.calls.append(stage)
            (context.folder / "half.txt").write_text("written before the end")
            if stage in self.fail:
                raise self.fail[stage]
            return {"inputs_seen": sorted(context.inputs), "paths": [m.folder for m in context.inputs.values()]}

        return run


class NoTracker(tracking.NullTracker):
    def describe(self, manifest): ...
    def finish(self, status): ...
    def ids(self):
        return {}


class NoTracking(tracking.Tracking):
    def __init__(self) -> None:
        self.status = ""

    def stage(self, *_):
        return NoTracker()

    def close(self, status):
        self.status = status


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Fake stages, no Ray, no MLflow, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    stages = Stages()
    stages.tracking = NoTracking()
    stages.connected = 0

    @contextmanager
    def connect(*_):
        stages.connected += 1
        yield

    monkeypatch.setattr(runner, "stage_function", stages.function)
    for module in (runner, schedule):
        monkeypatch.setattr(module, "check_against_data", lambda *_: None)  # these stages make no data
    monkeypatch.setattr(runner.cluster, "connect", connect)
    monkeypatch.setattr(runner, "Tracking", lambda *_: stages.tracking)
    return stages


def job(text: str = LINE, *overrides: str):
    Path("job.yaml").write_text(text)
    return load_job("job.yaml", list(overrides))


def run(*overrides: str, text: str = LINE) -> list[str]:
    return runner.run_job(job(text, *overrides), "job.yaml", list(overrides)).ran


def test_second_run_does_nothing_and_starts_nothing(world, capsys):
    assert run() == list(STAGES)
    connected = world.connected
    capsys.readouterr()
    assert run() == []
    assert world.calls == list(STAGES)
    assert world.connected == connected == 1
    assert "nothing to do: all 6 stages are finished" in capsys.readouterr().out
    lines = "\n".join(runner.run_job(job(), "job.yaml").lines())
    assert "report" in lines
    assert "make ui" in lines


def test_the_outputs_shown_are_those_of_the_job_and_not_the_newest(world):
    first = runner.run_job(job(), "job.yaml")
    run("evaluate.n_pcs=3")  # a newer report
    again = runner.run_job(job(), "job.yaml")
    assert again.ran == []
    assert again.lines() == first.lines()


@pytest.mark.parametrize(
    ("override", "rerun"),
    [
        ("evaluate.n_pcs=3", ["evaluate"]),
        ("generate.per_label={cell_type: 6}", ["generate", "evaluate"]),
        ("train_flow.train.max_steps=3", ["train_flow", "generate", "evaluate"]),
        ("encode.batch_size=3", ["encode", "train_flow", "generate", "evaluate"]),
        ("train_vae.train.max_steps=3", ["train_vae", "encode", "train_flow", "generate", "evaluate"]),
        ("ingest.max_cells=30", list(STAGES)),
        ("seed=5", list(STAGES)),
        ("resources.workers=4", []),
    ],
)
def test_a_changed_setting_reruns_exactly_what_depends_on_it(world, override, rerun):
    run()
    assert run(override) == rerun
    assert run() == []  # the first results are still there


def test_the_reason_for_a_rerun_is_said(world, capsys):
    run()
    capsys.readouterr()
    run("train_vae.train.max_steps=20")
    said = capsys.readouterr().out
    assert "will run (setting changed: train.max_steps 600 -> 20)" in said
    assert "will run (new train_vae)" in said


@pytest.mark.row("G8")
def test_a_changed_conditions_table_reruns_generate(world):
    Path("table.csv").write_text("cell_type,n_cells\nB,3\n")
    text = LINE.replace("{per_label: {cell_type: 5}}", "{conditions: table.csv}")
    assert run(text=text) == list(STAGES)
    Path("table.csv").write_text("cell_type,n_cells\nB,4\n")
    assert run(text=text) == ["generate", "evaluate"]


def test_every_stage_gets_the_inputs_it_needs(world):
    run()
    facts = newest_manifest(Path("runs/demo"), "generate").facts
    assert facts["inputs_seen"] == ["ingest", "train_flow", "train_vae"]
    assert all(Path(p, "manifest.json").is_file() for p in facts["paths"])


def test_single_jobs_find_what_the_line_made(world):
    run()
    single = "kind: generate\nname: demo\nper_label: {cell_type: 5}\n"
    assert run(text=single) == []
    assert run("seed=1", text=single) == ["generate"]


def test_missing_inputs_are_all_named_before_anything_starts(world):
    Path("jobs").mkdir()
    Path("jobs/ingest.yaml").touch()
    Path("encode.yaml").touch()
    with pytest.raises(InputError) as caught:
        run(text="kind: evaluate\nname: demo\n")
    message = str(caught.value)
    for stage in STAGES[:-1]:
        assert f"{stage}: needed by" in message
    assert "scldm run jobs/ingest.yaml" in message
    assert "scldm run encode.yaml" in message  # next to the job's own file
    assert "a job file of kind: train_flow" in message  # there is none
    assert world.connected == 0
    assert not Path("runs").exists()


def test_cells_of_perturb_that_were_not_made_are_named(world):
    run()
    with pytest.raises(InputError, match="perturb: needed by evaluate"):
        run(text="kind: evaluate\nname: demo\ncells: perturb\n")


def test_inputs_name_a_folder_and_its_ancestors_follow(world):
    run()
    old = newest_manifest(Path("runs/demo"), "train_flow")
    run("train_vae.train.max_steps=20")
    text = "kind: generate\nname: demo\nper_label: {cell_type: 9}\n"
    run(f"inputs.train_flow={old.folder}", text=text)
    made = newest_manifest(Path("runs/demo"), "generate")
    assert made.inputs == {
        "ingest": old.inputs["ingest"],
        "train_vae": old.inputs["train_vae"],
        "train_flow": old.version,
    }


def test_a_model_of_another_pipeline_does_not_bring_its_cells_along(world):
    run()
    vae = newest_manifest(Path("runs/demo"), "train_vae").folder
    ingest = newest_manifest(Path("runs/demo"), "ingest").folder
    text = "kind: encode\nname: mine\n"
    with pytest.raises(InputError, match="and this job would read those, not the cells of mine") as refused:
        run(f"inputs.train_vae={vae}", text=text)
    assert not Path("runs/mine").exists()
    named = re.search(r"inputs\.ingest=(\S+)", str(refused.value))
    assert Path(named[1]).samefile(ingest)
    assert run(f"inputs.train_vae={vae}", named[0], text=text) == ["encode"]


def test_inputs_that_hold_nothing_or_something_else_are_refused(world):
    run()
    text = "kind: generate\nname: demo\nper_label: {cell_type: 9}\n"
    with pytest.raises(InputError, match="no finished train_flow"):
        run("inputs.train_flow=nowhere", text=text)
    vae = newest_manifest(Path("runs/demo"), "train_vae").folder
    with pytest.raises(InputError, match="holds a train_vae, expected a train_flow"):
        run(f"inputs.train_flow={vae}", text=text)


@pytest.mark.row("C10")
def test_latents_of_another_vae_are_refused(world):
    run()
    run("train.max_steps=20", text="kind: train_vae\nname: demo\n")
    with pytest.raises(InputError, match=r"encode .* was made from train_vae .*Make encode again"):
        run("train.max_steps=9", text="kind: train_flow\nname: demo\n")


def test_a_crash_leaves_no_manifest_and_the_rerun_goes_on(world):
    world.fail["encode"] = RuntimeError("out of luck\nsecond line")
    with pytest.raises(runner.StageFailed) as caught:
        run()
    assert str(caught.value) == "encode failed: RuntimeError: out of luck"
    assert "second line" in caught.value.log.read_text()
    assert newest_manifest(Path("runs/demo"), "encode") is None
    assert world.tracking.status == "FAILED"
    world.fail.clear()
    assert run() == ["encode", "train_flow", "generate", "evaluate"]


@pytest.mark.parametrize(
    ("point", "left"), [("stage.before_run", 5), ("stage.before_manifest", 5), ("stage.after_manifest", 4)]
)
def test_a_stage_counts_as_finished_from_its_manifest_on_wherever_its_process_dies(world, point, left):
    faults.arm(f"{point}:n=2:raise")
    try:
        with pytest.raises(runner.StageFailed, match="train_vae failed: FaultError"):
            run()
    finally:
        faults.arm("")
    assert run() == list(STAGES)[-left:]


def test_bad_input_found_by_a_stage_stays_bad_input(world):
    error = RuntimeError("task failed")
    error.cause = InputError("X holds log-normalised values")  # what Ray's errors look like
    world.fail["ingest"] = error
    with pytest.raises(InputError, match="ingest: X holds log-normalised values"):
        run()


def test_ctrl_c_is_passed_on_and_tracked_as_killed(world):
    world.fail["train_vae"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert world.tracking.status == "KILLED"
    assert not list(Path("runs").rglob(LOCK))


@pytest.mark.row("T13")
def test_a_folder_in_use_is_refused(world, tmp_path):
    with stage_lock(tmp_path), pytest.raises(InputError, match="is being written by process"), stage_lock(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


@pytest.mark.row("T13")
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    from pipeline.core.lock import _host

    (tmp_path / LOCK).write_text(json.dumps({"pid": 2**22 + 1, "host": _host(), "started": "1", "token": "x"}))
    said: list[str] = []
    with stage_lock(tmp_path, said.append):
        assert "is gone" in said[0]


@pytest.mark.row("T13")
def test_a_lock_from_another_host_counts_by_its_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.core.lock, "BEAT_SECONDS", 0.1)
    lock = tmp_path / LOCK
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "token": "x"}))
    with pytest.raises(InputError), stage_lock(tmp_path):
        pass
    os.utime(lock, (0, 0))
    with stage_lock(tmp_path, lambda _: None):
        pass


@pytest.mark.row("T13", "T14")
@pytest.mark.parametrize("days", [-30, 30])
def test_a_clock_that_is_days_off_neither_takes_a_living_lock_nor_leaves_a_dead_one(tmp_path, monkeypatch, days):
    """The other host's beats carry its own time."""
    monkeypatch.setattr(pipeline.core.lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(pipeline.core.lock, "STALE_SECONDS", 1.0)
    lock, over = tmp_path / LOCK, threading.Event()
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "token": "x"}))

    def beat() -> None:
        while not over.wait(0.1):
            os.utime(lock, times=(0, time.time() + days * 86_400))

    other = threading.Thread(target=beat)
    other.start()
    time.sleep(0.3)
    try:
        with pytest.raises(InputError, match="is being written"), stage_lock(tmp_path):
            pass
    finally:
        over.set()
        other.join()
    with stage_lock(tmp_path, lambda _: None):
        pass


def test_output_is_relative_to_here_but_not_to_rays_copy(world, tmp_path, monkeypatch):
    assert output_root(job()) == tmp_path / "runs"
    package = tmp_path / "working_dir_files" / "_ray_pkg_1a2b"
    package.mkdir(parents=True)
    monkeypatch.setenv("SCLDM_HOME", str(tmp_path / "home"))
    assert output_root(job(), cwd=package) == tmp_path / "home" / "runs"
    assert pipeline_folder(job(LINE, f"output={tmp_path}/x")) == tmp_path / "x" / "demo"


def test_object_stores_are_refused_as_output(world):
    with pytest.raises(InputError, match="a path that every node mounts"):
        run("output=s3://bucket/runs")


def test_the_resolved_job_lies_beside_the_result_and_runs_again(world):
    run("train_vae.train.max_steps=20")
    folder = newest_manifest(Path("runs/demo"), "train_vae").folder
    again = load_job(Path(folder) / "config.yaml")
    assert again.train_vae.train.max_steps == 20
    assert runner.run_job(again, "config.yaml", []).ran == []


def test_an_input_that_changes_while_ingest_runs_is_refused(world, tmp_path, monkeypatch):
    cells = tmp_path / "cells.h5ad"
    cells.write_text("before")
    text = LINE.replace("type: synthetic", f"type: h5ad, path: {cells}")
    stage_function = runner.stage_function

    def changes(stage):
        cells.write_text("after")
        return stage_function(stage)

    monkeypatch.setattr(runner, "stage_function", changes)
    with pytest.raises(InputError, match=r"source.path: .*cells.h5ad changed while ingest ran"):
        run(text=text)
    monkeypatch.setattr(runner, "stage_function", stage_function)
    assert run(text=text) == list(STAGES)
    manifest = newest_manifest(pipeline_folder(job(text)), "ingest")
    assert list(manifest.contents["source"]) == ["cells.h5ad"]


def test_a_model_that_changes_before_its_stage_runs_is_refused(world, tmp_path, monkeypatch):
    write_vae(tmp_path / "model")
    text = f"{LINE}train_vae: {{pretrained: {tmp_path / 'model'}}}\n"
    stage_function = runner.stage_function

    def changes(stage):
        if stage == "ingest":
            write_vae(tmp_path / "model", input="count_aware")
        return stage_function(stage)

    monkeypatch.setattr(runner, "stage_function", changes)
    with pytest.raises(InputError, match=r"pretrained: .*model stands for another model than when this job began"):
        run(text=text)
    assert world.calls == ["ingest"]
    assert run(text=text) == list(STAGES[1:])


def test_the_content_of_its_input_is_added_to_a_result_of_0_1(world, tmp_path):
    cells = tmp_path / "cells.h5ad"
    cells.write_text("counts")
    time.sleep(0.05)
    text = LINE.replace("type: synthetic", f"type: h5ad, path: {cells}")
    step = resolve(job(text)).steps[0]
    (old,) = versions_of_0_1("ingest", step.config, {}, 0, step.contents)
    folder = step.folder.parent / old
    folder.mkdir(parents=True)
    write_manifest(replace(Manifest.planned("ingest", old, folder), finished_at=time.time(), seconds=0.01))
    assert "ingest" not in run(text=text)
    assert list(newest_manifest(pipeline_folder(job(text)), "ingest").contents["source"]) == ["cells.h5ad"]
    cells.touch()
    assert run(text=text) == []
