"""Readers are killed in the middle of an epoch, and go on with as many workers or others: nothing is lost or doubled.

Readers are processes. Each writes what it got of a step to a file of its own, down to the disk, before it takes the
next step; the position is the last step that all of them wrote, as a training checkpoint would have it. Whatever was
written behind the position at a kill is void, as the weights of a killed run are.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp

from pipeline.data.entries import CountEntries
from pipeline.data.loading.blocks import SomaBlocks, SomaReader
from pipeline.data.loading.feed import feed
from pipeline.data.loading.order import FeedOrder
from pipeline.data.soma.assemble import PlacedEntries, assemble
from pipeline.data.soma.write import write_experiment

pytestmark = pytest.mark.chaos
N, G, TILE, LANES, BATCH, STOP = 2000, 20, 64, 4, 48, 100  # steps: two epochs and a bit
KILLS = 12
PATIENCE = 180  # seconds for a group to get going on a busy machine


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    counts = sp.random(N, G, 0.3, format="csr", random_state=0, data_rvs=lambda n: np.ones(n)).astype(np.float32)
    obs = pd.DataFrame({"is_primary_data": [True] * N})
    var = pd.DataFrame({"feature_id": [f"g{i}" for i in range(G)], "feature_name": "x", "feature_length": 0})
    store = write_experiment(tmp_path_factory.mktemp("killed") / "soma", obs, var, [counts], tile=TILE)
    reader = SomaReader(store.uri, {}, "RNA", "raw", np.arange(G, dtype=np.int32), (), "uint16")
    return SomaBlocks(np.flatnonzero(np.arange(N) % 5), {}, TILE, reader)  # four in five cells are in the split


def order_of(source: SomaBlocks) -> FeedOrder:
    return FeedOrder(source.ids, TILE, seed=2, batch_size=BATCH, lanes=LANES, block_rows=96)


def lines(source: SomaBlocks, rank: int, world_size: int, start: int, engine: Any) -> Iterator[dict[str, Any]]:
    order = order_of(source)
    steps = feed(
        source, order, rank=rank, world_size=world_size, start_step=start, stop_step=STOP, micro_batch_size=BATCH,
        engine=engine,
    )  # fmt: skip
    for step in steps:
        ids = np.concatenate([t["soma_joinid"].to_numpy() for t in step.micro]).reshape(-1, order.rows_per_lane)
        weights = np.concatenate([t["weight"].to_numpy() for t in step.micro]).reshape(ids.shape)
        lanes = order.lanes_of(rank, world_size)
        yield {"step": step.step, "lanes": lanes, "ids": ids.tolist(), "weights": weights.tolist()}


def read_and_write(
    source: SomaBlocks, rank: int, world_size: int, start: int, path: Path, engine: str, pause: float = 0.004
) -> None:
    """What a reader does until it is killed or done; `pause` is its work on a step, in seconds."""
    with path.open("w") as file:
        for line in lines(source, rank, world_size, start, engine):
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            time.sleep(pause)


def written(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a reader; the last may have been cut by the kill."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class Ledger:
    """Steps that count: (step, lane) -> ids and weights."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
        self.position = 0

    def commit(self, paths: list[Path]) -> None:
        """Up to the last step that every reader wrote."""
        found = [written(path) for path in paths]
        stop = min(lines[-1]["step"] + 1 if lines else self.position for lines in found)
        for line in (line for lines in found for line in lines if line["step"] < stop):
            for lane, ids, weights in zip(line["lanes"], line["ids"], line["weights"], strict=True):
                assert (line["step"], lane) not in self.rows, "a lane of a step was read by two workers"
                self.rows[line["step"], lane] = ids, weights
        self.position = stop

    def must_equal_the_uninterrupted(self, source: SomaBlocks) -> None:
        whole = {
            (line["step"], lane): (ids, weights)
            for line in lines(source, 0, 1, 0, "local")
            for lane, ids, weights in zip(line["lanes"], line["ids"], line["weights"], strict=True)
        }
        assert self.position == STOP
        assert self.rows == whole
        n = order_of(source).n_steps_per_epoch
        for epoch in range(STOP // n):
            seen = [
                i
                for (step, _), (ids, weights) in self.rows.items() if step // n == epoch
                for i, w in zip(ids, weights, strict=True) if w == 1
            ]  # fmt: skip
            assert sorted(seen) == source.ids.tolist(), f"epoch {epoch}: not every cell exactly once"


def survive(
    source: SomaBlocks, folder: Path, worlds: list[int], start: Callable[[int, int, int, Path], Any],
    kill: Callable[[Any], None], rng: random.Random,
    check: Callable[[Any], Any] = lambda reader: None,
) -> tuple[Ledger, list[int]]:  # fmt: skip
    """Readers in groups of `worlds[0]`, `worlds[1]`, … workers, each group killed but the last.

    Args:
        start: (rank, world size, first step, file) to a running reader.
        check: Raises what a reader died of by itself.

    Returns:
        What was read, and the positions after the kills.
    """
    ledger, kills = Ledger(), []
    for attempt, world in enumerate(worlds):
        paths = [folder / f"{attempt}-{rank}.jsonl" for rank in range(world)]
        readers = [start(rank, world, ledger.position, path) for rank, path in enumerate(paths)]
        last = attempt == len(worlds) - 1
        goal = STOP if last else min(STOP - 1, ledger.position + rng.randint(1, STOP * 3 // 2 // len(worlds)))
        deadline = time.monotonic() + PATIENCE
        while min(written(p)[-1]["step"] + 1 if written(p) else ledger.position for p in paths) < goal:
            assert time.monotonic() < deadline, f"readers of attempt {attempt} made no progress"
            time.sleep(0.002)
            for reader in readers:
                check(reader)
        time.sleep(0 if last else rng.uniform(0, 0.01))  # anywhere in a step
        for reader in rng.sample(readers, len(readers)):
            kill(reader)
        ledger.commit(paths)
        kills.append(ledger.position)
    return ledger, kills[:-1]


class Nursery:
    """A process that has imported all a reader needs and forks readers: `python test_killed_reading.py SOURCE`."""

    def __init__(self, source: SomaBlocks, folder: Path):
        (folder / "source").write_bytes(pickle.dumps(source))
        command = [sys.executable, __file__, str(folder / "source")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert self.process.stdout.readline() == "ready\n"

    def start(self, rank: int, world: int, first: int, path: Path) -> int:
        self.process.stdin.write(json.dumps([rank, world, first, str(path)]) + "\n")
        return int(self.process.stdout.readline())

    @staticmethod
    def kill(pid: int) -> None:
        """SIGKILL, and wait for the end; the nursery buries its dead."""
        with suppress(ProcessLookupError):
            while True:
                os.kill(pid, signal.SIGKILL)
                time.sleep(0.001)

    def close(self) -> None:
        self.process.communicate()


def main() -> None:
    """The nursery. Nothing of TileDB is opened before the forks: its threads would not be in the children."""
    source = pickle.loads(Path(sys.argv[1]).read_bytes())
    a_cell = pa.table({"cells": [0], "genes": [0], "counts": pa.array([1], pa.float32())}).to_batches()[0]
    entries = PlacedEntries(0, np.zeros(1, np.int64), CountEntries(*(column.to_numpy() for column in a_cell.columns)))
    kinds = {"gene_type": np.uint16, "count_type": np.uint16}
    _ = assemble([entries], 1, source.reader.gene_lut, **kinds).row_sums  # compiled once, here
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        rank, world, first, path = json.loads(line)
        pid = os.fork()
        if pid == 0:
            read_and_write(source, rank, world, first, Path(path), "local")
            os._exit(0)
        print(pid, flush=True)


def test_reading_killed_at_random_goes_on_with_any_number_of_workers(source, tmp_path):
    nursery, rng = Nursery(source, tmp_path), random.Random(7)
    worlds = [rng.choice([1, 2, 4]) for _ in range(KILLS + 1)]
    ledger, kills = survive(source, tmp_path, worlds, nursery.start, nursery.kill, rng)
    nursery.close()
    per_epoch = order_of(source).n_steps_per_epoch
    assert sum(k % per_epoch != 0 and k < STOP for k in kills) >= KILLS // 2, "most kills must be inside an epoch"
    ledger.must_equal_the_uninterrupted(source)


def test_reading_through_ray_survives_the_same(source, tmp_path, ray_cluster):
    import ray

    @ray.remote(num_cpus=0, max_restarts=0, max_concurrency=2)
    class Reader:
        def pid(self) -> int:
            return os.getpid()

        def read(self, here: str, *args: Any) -> None:
            sys.path.insert(0, here)  # a worker of Ray does not know the folders of pytest
            from test_killed_reading import read_and_write

            read_and_write(*args)

    def start(rank: int, world: int, first: int, path: Path) -> Any:
        actor = Reader.remote()
        pid = ray.get(actor.pid.remote())
        return pid, actor, actor.read.remote(str(Path(__file__).parent), source, rank, world, first, path, "ray", 0.02)

    def kill(reader: Any) -> None:
        os.kill(reader[0], signal.SIGKILL)

    def check(reader: Any) -> None:
        if ray.wait([reader[2]], timeout=0)[0]:
            ray.get(reader[2])

    ledger, kills = survive(source, tmp_path, [2, 1], start, kill, random.Random(3), check)
    assert all(0 < k < STOP for k in kills)
    ledger.must_equal_the_uninterrupted(source)


if __name__ == "__main__":
    main()
