"""Memory, files and logs of a long run do not grow with its length, or grow as promised."""

from __future__ import annotations

import json
import sqlite3

import numpy as np
import pytest
from helpers.training import long_run
from helpers.training.long_run import EVERY, STEPS
from helpers.training.ranks import start
from helpers.training.tracked_training import open_driver

from pipeline.training.callbacks.metrics_log import LOG_EVERY

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1800)]
WARM = 1500  # steps, until caches are full
MOST_MB = 5.0  # per thousand steps
MOST_KEYS = 40  # of a row of metrics
LOG_BYTES_A_STEP = 4.0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("long")
    folder = root / "demo" / "train_vae" / "a1"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("kind: train_vae\n")
    driver = open_driver(root, f"sqlite:///{root}/mlflow.db")
    stage = driver.stage("train_vae", "a1", folder, {"train": {}}, {})
    (folder / "tracker.json").write_text(json.dumps(stage.spec()))
    assert start(folder, long_run.work, 1, timeout=1500) == [0], (folder / "log").read_text()[-3000:]
    stage.finish()
    driver.close()
    return folder, root / "mlflow.db"


@pytest.fixture(scope="module")
def looks(run):
    rows = [json.loads(line) for line in (run[0] / "looks.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(EVERY, STEPS + 1, EVERY))
    return [r for r in rows if r["step"] >= WARM]


def test_memory_open_files_and_threads_stay_flat(looks):
    steps, rss = (np.array([r[k] for r in looks]) for k in ("step", "rss_mb"))
    slope = float(np.polyfit(steps / 1000, rss, 1)[0])
    assert slope < MOST_MB, f"{slope:.1f} MB per 1,000 steps: {rss.round(1).tolist()}"
    for what in ("files", "threads"):
        assert len({r[what] for r in looks[-8:]}) <= 2, [r[what] for r in looks]
        assert looks[-1][what] <= looks[0][what] + 2, [r[what] for r in looks]


def test_kept_checkpoints_logs_and_metrics_are_bounded(run):
    folder, _ = run
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(LOG_EVERY, STEPS + 1, LOG_EVERY))
    assert max(len(r) for r in rows) <= MOST_KEYS
    assert (folder / "log").stat().st_size < 20_000 + LOG_BYTES_A_STEP * STEPS
    assert not [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


def test_mlflow_gets_every_logged_row_once(run):
    folder, store = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = sum(len(r) - 2 for r in rows)  # without step and time
    with sqlite3.connect(store) as db:
        n, doubled = db.execute(
            "select count(*), count(*) - count(distinct run_uuid || key || step) from metrics"
        ).fetchone()
    assert doubled == 0
    assert n == expected
