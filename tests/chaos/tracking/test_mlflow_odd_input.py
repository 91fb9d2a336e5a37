"""Odd values, floods and full artifact stores: MLflow gets what it can take, and nothing stops.

Rows M6 to M9 of the project's list of faults, on a real server.
"""

from __future__ import annotations

import logging
import math
import time

import pytest
from helpers.training.tracked_training import STEPS, Trained, open_driver, synced, train

from pipeline.tracking.mlflow_runs.client import mlflow_client
from pipeline.tracking.provenance import read_ids
from pipeline.tracking.sender import BackgroundSender
from pipeline.tracking.tracker import WorkerTracker

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("patience")]


@pytest.mark.row("M6")
def test_M6_a_resume_with_another_learning_rate_keeps_the_param_and_says_what_changed(server, tmp_path, caplog):
    train(tmp_path, server.uri, lr=0.1)
    with caplog.at_level(logging.WARNING, "pipeline.tracking"):
        done = train(tmp_path, server.uri, lr=0.05)
    done.was_not_held_up()
    assert "INVALID_PARAMETER_VALUE" not in caplog.text
    assert caplog.text == ""
    run = done.run(server.uri)
    assert run.data.params["train.lr"] == "0.1"
    assert run.data.tags["scldm.changed_params"] == "train.lr 0.1 -> 0.05"
    assert run.data.tags["mlflow.note.content"].endswith("continued with other settings: train.lr 0.1 -> 0.05")
    assert run.data.tags["scldm.attempt"] == "2"
    assert done.steps_in(server.uri) == list(range(1, STEPS + 1))  # the steps that were taken twice are there once


@pytest.mark.row("M7")
def test_M7_a_flood_overflows_the_queue_and_still_arrives_whole(server, tmp_path):
    folder = tmp_path / "demo" / "train_vae" / "a1"
    folder.mkdir(parents=True)
    driver = open_driver(tmp_path, server.uri)
    stage = driver.stage("train_vae", "a1", folder, {}, {})
    worker = WorkerTracker(folder, server.uri, BackgroundSender(capacity=5, retry_seconds=0.2))
    n_steps, n_metrics, done = 60, 100, Trained(folder)
    for step in range(n_steps):
        began = time.perf_counter()
        worker.metrics({f"flood/{i}": i + step for i in range(n_metrics)}, step=step)
        done.seconds.append(time.perf_counter() - began)
        done.sleep(0.02)
    worker.close()
    stage.finish()
    driver.close()
    done.was_not_held_up()
    assert synced(done) == []
    for i in (0, 57, n_metrics - 1):
        assert done.steps_in(server.uri, f"flood/{i}") == list(range(n_steps))


@pytest.mark.row("M8")
def test_M8_odd_numbers_names_and_lengths_never_raise_and_stop_nothing(server, tmp_path):
    folder = tmp_path / "demo" / "train_vae" / "a1"
    folder.mkdir(parents=True)
    driver = open_driver(tmp_path, server.uri)
    stage = driver.stage("train_vae", "a1", folder, {"long": "x" * 10_000, "odd name! (%)": 1, "a//../b": 2}, {})
    stage.metrics({"nan": math.nan, "inf": -math.inf, "huge": 1e308, "../../etc": 1.0, "CD4+ T, \u03b1\u03b2/#": 2.0})
    stage.metrics({"": 3.0, "/": 4.0, "x" * 300: 5.0, "x" * 301: 6.0, "a/./b/": 7.0})
    stage.tag("k" * 400, "v" * 20_000)
    stage.tag("empty", "")
    stage.metrics({"after": 8.0})
    stage.finish()
    driver.close()
    run = Trained(folder).run(server.uri)
    assert run.info.status == "FINISHED"
    found = run.data.metrics
    assert found["after"] == 8.0
    assert found["huge"] == 1e308
    assert found["etc"] == 1.0
    assert found["a/b"] == 7.0
    assert sorted(v for k, v in found.items() if k.startswith("_")) == [3.0, 4.0]
    assert sorted(v for k, v in found.items() if k.startswith("xxx")) == [5.0, 6.0]
    assert "nan" not in found
    assert run.data.tags["scldm.skipped_metrics"] == "2"
    assert len(run.data.params["long"]) == 6000


@pytest.mark.row("M9")
def test_M9_an_artifact_store_that_takes_nothing_costs_the_figures_alone_until_it_does(server, tmp_path, caplog):
    server.artifacts.mkdir(exist_ok=True)
    server.artifacts.rename(server.artifacts.with_name("aside"))
    server.artifacts.write_text("a file where the folder should be: as full as a disk can be")
    try:
        with caplog.at_level(logging.WARNING, "pipeline.tracking"):
            done = train(tmp_path, server.uri)
        assert "config.yaml is not stored" in caplog.text
        done.was_not_held_up()
        assert done.steps_in(server.uri) == list(range(1, STEPS + 1))
        assert done.run(server.uri).info.status == "FINISHED"
    finally:
        server.artifacts.unlink()
        server.artifacts.with_name("aside").rename(server.artifacts)
    assert synced(done) == []
    names = {f.path for f in mlflow_client(server.uri).list_artifacts(read_ids(done.folder)["run_id"])}
    assert {"config", "env", "manifests"} <= names
