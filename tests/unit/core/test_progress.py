"""Progress is passed through a file and shown as one line of a log."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from types import SimpleNamespace

import pytest

from pipeline.config.job import TrainConfig
from pipeline.core.logs import setup_logging
from pipeline.core.progress import PROGRESS, ProgressReader, ProgressWriter, in_notebook, progress_line
from pipeline.core.text import compact, duration
from pipeline.tracking.tracker import NullTracker
from pipeline.training.callbacks.metrics_log import MetricsLog
from pipeline.training.state import TrainingState


def test_a_line_shows_step_loss_rate_speed_and_eta():
    progress = {"step": 120, "total": 600, "fields": {"loss": 412.34, "lr": 1e-3, "cells_per_s": 184.2}}
    expected = "train_vae | step 120/600 | loss 412.3 | lr 1.0e-3 | 184 cells/s | eta 1m20s"
    assert progress_line("train_vae", progress, 80) == expected


def test_the_first_step_of_an_attempt_shows_no_rate_that_nobody_knows_yet(tmp_path):
    config, state = TrainConfig(max_steps=600), TrainingState(max_steps=600, step=549)
    metrics_log = MetricsLog(tmp_path, NullTracker(), config, batch_size=8, mfu=lambda rate: rate)
    metrics_log.on_train_start(state)
    state.begin_step(550, lr=1e-3)
    metrics_log.on_step_end(state)
    assert json.loads((tmp_path / PROGRESS).read_text())["fields"] == {}
    for step in range(551, 561):
        time.sleep(0.001)
        state.begin_step(step, lr=1e-3)
        metrics_log.on_step_end(state)
    first, then = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert abs(first.pop("time_ms") / 1000 - time.time()) < 60
    assert first == {"step": 550, "train/cells_seen": 4400.0}
    assert then["perf/cells_per_s"] == then["perf/mfu"] > 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (80, "1m20s"), (11_520, "3h12m"), (187_200, "2d04h")]
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.32, "0.32"), (184.4, "184"), (18_400, "18.4k"), (2.1e6, "2.1M")])
def test_speeds_are_for_people(value, text):
    assert compact(value) == text


def test_the_writer_writes_at_most_once_a_second_and_always_at_the_end(tmp_path):
    now = 0.0
    writer = ProgressWriter(tmp_path, clock=lambda: now)
    written = []
    for step in range(1, 11):
        now += 0.3
        writer.update(step, 10, loss=1.0)
        written.append(json.loads((tmp_path / PROGRESS).read_text())["step"])
    assert written == [1, 1, 1, 1, 5, 5, 5, 5, 9, 10]


def test_a_log_gets_lines_and_the_last_state(tmp_path):
    stream = io.StringIO()
    writer = ProgressWriter(tmp_path, every_seconds=0)
    with ProgressReader(tmp_path, "train_vae", 0.05, stream=stream, poll_seconds=0.01):
        for step in (1, 2, 3):
            writer.update(step, 3, loss=float(step))
            time.sleep(0.1)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("train_vae | step 1/3 | loss 1")
    assert lines[-1] == "train_vae | step 3/3 | loss 3"
    assert len(lines) == len(set(lines))


def test_the_file_of_an_earlier_attempt_is_not_shown(tmp_path):
    import os

    ProgressWriter(tmp_path).update(5, 10)
    os.utime(tmp_path / PROGRESS, (1, 1))
    stream = io.StringIO()
    with ProgressReader(tmp_path, "encode", 0.05, stream=stream):
        time.sleep(0.1)
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with ProgressReader(tmp_path, "train_flow", 0.05, stream=stream, poll_seconds=0.02):
        ProgressWriter(tmp_path).update(3, 3, loss=2.5)
        time.sleep(0.1)
    assert "train_flow" in stream.getvalue()
    assert "loss 2.5" in stream.getvalue()


def test_the_eta_of_a_resumed_run_counts_from_where_it_resumed(tmp_path):
    reader = ProgressReader(tmp_path, "train_vae")
    assert reader._eta({"step": 500, "total": 600, "at": 1000.0}) is None
    assert reader._eta({"step": 510, "total": 600, "at": 1010.0}) == pytest.approx(90)
    assert reader._eta({"step": 505, "total": 600, "at": 1020.0}) is None  # back to a checkpoint
    assert reader._eta({"step": 515, "total": 600, "at": 1030.0}) == pytest.approx(85)


def test_a_full_disk_does_not_stop_the_worker(tmp_path):
    ProgressWriter(tmp_path / "gone").update(1, 2)
    assert not (tmp_path / "gone").exists()


def test_without_a_terminal_progress_goes_to_the_log(tmp_path, capsys):
    setup_logging(stage="ingest")
    with ProgressReader(tmp_path, "ingest cache", 0.05, poll_seconds=0.01):
        ProgressWriter(tmp_path, every_seconds=0).update(3, 3)
    assert re.search(r"^\d\d:\d\d:\d\d ingest cache \| step 3/3$", capsys.readouterr().out, re.M)


def test_a_notebook_gets_a_bar_in_place_of_lines(tmp_path, capsys, monkeypatch):
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    writer = ProgressWriter(tmp_path)
    with ProgressReader(tmp_path, "train_vae", poll_seconds=0.01):
        writer.update(3, 12, loss=2.0)
        time.sleep(0.3)
        writer.update(12, 12, loss=1.5)
        time.sleep(0.1)
    said = capsys.readouterr().out
    assert "train_vae  25%" in said
    assert "step 12/12 | loss 1.5" in said.split("\r")[-1]


def test_a_terminal_with_ipython_is_no_notebook(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not in_notebook()
