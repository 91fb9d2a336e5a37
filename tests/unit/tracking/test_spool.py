"""The file of waiting records survives what processes die of: half lines, a kill during a replay, two readers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

from pipeline.tracking.spool import SpooledWriter
from pipeline.tracking.spool_file import append, claim, parse, put_back, waiting

NAME = "mlflow_spool.jsonl"


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def records(path: Path) -> list[dict]:
    return parse(path.read_text().splitlines(), path)


class Taking:
    """A service that takes everything, or nothing while it is down."""

    def __init__(self, folder: Path) -> None:
        self.name, self.spool = "taking", folder / NAME
        self.down, self.refuses, self.got = False, (), []

    def spools(self) -> list[Path]:
        return waiting(self.spool.parent, NAME)

    def send(self, some):
        if self.down:
            raise ConnectionError("down")
        self.got += [r["n"] for r in some if r["n"] not in self.refuses]
        return [r for r in some if r["n"] in self.refuses]


def test_a_half_line_spoils_neither_its_neighbour_nor_the_rest(tmp_path):
    spool = tmp_path / NAME
    append(spool, [{"n": 1}])
    with spool.open("a") as f:
        f.write('{"n": 2, "va')  # killed here
    append(spool, [{"n": 3}])
    assert records(spool) == [{"n": 1}, {"n": 3}]


def test_what_a_killed_process_had_taken_is_found_and_sent(tmp_path):
    host = socket.gethostname().replace(".", "_")
    left = tmp_path / f".{NAME}.{host}-{dead_pid()}-0"
    left.write_text('{"n": 1}\n')
    append(tmp_path / NAME, [{"n": 2}])
    target = Taking(tmp_path)
    writer = SpooledWriter()
    writer.put(target, {"n": 3})
    writer.close()
    assert target.got == [1, 2, 3]
    assert list(tmp_path.iterdir()) == []


def test_what_a_living_process_has_taken_is_left_to_it(tmp_path):
    append(tmp_path / NAME, [{"n": 1}])
    taken = claim(tmp_path / NAME)
    assert waiting(tmp_path, NAME) == []
    assert claim(tmp_path / NAME) is None  # the second reader finds nothing
    put_back(taken, tmp_path / NAME, ['{"n": 1}\n'])
    assert waiting(tmp_path, NAME) == [tmp_path / NAME]


def test_what_another_machine_took_is_left_to_it_for_a_while(tmp_path):
    other = tmp_path / f".{NAME}.elsewhere-17-0"
    other.write_text('{"n": 1}\n')
    assert waiting(tmp_path, NAME) == []
    long_ago = time.time() - 3600
    import os

    os.utime(other, (long_ago, long_ago))
    assert waiting(tmp_path, NAME) == [other]


def test_records_stay_in_order_through_an_outage(tmp_path):
    target = Taking(tmp_path)
    target.down = True
    writer = SpooledWriter(retry_seconds=0.05)
    for n in range(500):
        writer.put(target, {"n": n})
    time.sleep(0.1)
    target.down = False
    for n in range(500, 900):
        writer.put(target, {"n": n})
    writer.close()
    assert target.got == list(range(900))


def test_records_of_all_targets_survive_a_thread_that_is_given_up(tmp_path):
    class Stuck(Taking):
        def send(self, some):
            time.sleep(30)

    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    targets = [Stuck(folder) for folder in folders]
    writer = SpooledWriter()
    for n in range(300):  # more than a batch; the two take turns
        writer.put(targets[n % 2], {"n": n})
    writer.close(0.3)
    kept = [{r["n"] for r in records(t.spool)} for t in targets]
    assert kept == [set(range(0, 300, 2)), set(range(1, 300, 2))]


def test_a_refused_record_is_kept_apart_and_the_others_go_on(tmp_path):
    target = Taking(tmp_path)
    target.refuses = (3, 5)
    writer = SpooledWriter()
    for n in range(8):
        writer.put(target, {"n": n})
    writer.close()
    assert target.got == [0, 1, 2, 4, 6, 7]
    kept = [json.loads(x)["n"] for x in (tmp_path / f"refused.{NAME}").read_text().splitlines()]
    assert kept == [3, 5]


def test_a_queue_that_fills_goes_to_disk_and_nothing_is_dropped(tmp_path):
    class Slow(Taking):
        def send(self, some):
            time.sleep(0.05)
            return super().send(some)

    target = Slow(tmp_path)
    writer = SpooledWriter(capacity=2000)
    for n in range(6000):
        writer.put(target, {"n": n})
        if n % 100 == 0:
            time.sleep(0.01)
    writer.close(30)
    assert writer.dropped == 0
    assert sorted(target.got) == list(range(6000))
