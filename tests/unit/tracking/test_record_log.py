"""What a stage logged can be read back whatever happened to its processes, also from folders of version 0.1.0."""

from __future__ import annotations

import json
import os

from pipeline.tracking.record_log import DRIVER_LOG, WORKER_LOG, RecordLog, last_status, read_logs, spools


def tag(n: int, at: int) -> dict:
    return {"kind": "tag", "value": {"n": str(n)}, "at": at}


def test_records_of_all_processes_come_in_the_order_of_their_times(tmp_path):
    driver, worker = RecordLog(tmp_path / DRIVER_LOG), RecordLog(tmp_path / WORKER_LOG)
    driver.append(tag(1, at=10))
    worker.append(tag(2, at=20))
    driver.append(tag(3, at=30))
    assert [r["value"]["n"] for r in read_logs(tmp_path)] == ["1", "2", "3"]
    assert read_logs(tmp_path, WORKER_LOG) == [tag(2, at=20)]


def test_the_half_line_of_a_killed_process_spoils_neither_its_neighbour_nor_the_rest(tmp_path):
    path = tmp_path / DRIVER_LOG
    RecordLog(path).append(tag(1, at=1))
    with path.open("a") as f:
        f.write('{"kind": "tag", "va')  # killed here
    RecordLog(path).append(tag(3, at=3))
    assert read_logs(tmp_path) == [tag(1, at=1), tag(3, at=3)]


def test_the_points_of_a_training_are_its_metrics_file(tmp_path):
    rows = [{"step": 10, "time_ms": 7, "train/loss": 2.0, "val/loss": float("nan")}, {"step": 20, "train/loss": 1.0}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 30, "tr')
    os.utime(path, (5, 5))
    new, old = sorted(read_logs(tmp_path), key=lambda r: r["step"])
    assert new == {"kind": "metrics", "value": {"train/loss": 2.0}, "at": 7, "step": 10}
    assert old == {"kind": "metrics", "value": {"train/loss": 1.0}, "at": 5000, "step": 20}, "0.1.0 wrote no times"


def test_spools_of_version_0_1_0_are_read_in_all_their_names(tmp_path):
    names = [
        "mlflow_spool.jsonl", "mlflow_spool.worker.jsonl", ".mlflow_spool.jsonl.host-17-0", "refused.mlflow_spool.jsonl"
    ]  # fmt: skip
    for n, name in enumerate(names):
        (tmp_path / name).write_text(json.dumps(tag(n, at=n)) + "\n")
    assert {p.name for p in spools(tmp_path)} == set(names)
    assert read_logs(tmp_path) == [tag(n, at=n) for n in range(4)]


def test_a_full_disk_is_reported_once_and_raises_nothing(tmp_path, caplog):
    log = RecordLog(tmp_path / "gone" / DRIVER_LOG)
    log.append(tag(1, at=1))
    log.append(tag(2, at=2))
    assert caplog.text.count("cannot be written") == 1


def test_the_last_status_is_that_of_the_newest_attempt():
    records = [{"kind": "status", "value": v, "at": 0} for v in ("RUNNING", "FAILED", "RUNNING")]
    assert last_status([*records, tag(1, at=1)]) == records[-1]
    assert last_status([]) is None
