"""SIGKILL at every fault point of a training step, a checkpoint, its retention and its uploads, on every worker.

One run of two workers is killed again and again, each time at another point, and restarted; a run that ended before its
kill is followed by a new one. After each kill the checkpoint that the next attempt starts from verifies and is at most
an interval behind; at the end weights, average and cells are those of an uninterrupted run.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import time
from pathlib import Path

import pytest
from helpers.training.ranks import KILLED, cells_by_step, start, times_begun
from helpers.training.recorded_toy import (
    EVERY,
    STEPS,
    WORKERS,
    every_cell_once_an_epoch,
    first_step_after,
    log,
    lost_steps,
    result,
    run,
    told,
    two_saves,
)

from pipeline.core.fault_points import POINTS
from pipeline.training.checkpoints.manifest import newest

pytestmark = [pytest.mark.chaos, pytest.mark.row("C1")]
HANDFUL = (
    "checkpoint.after_shard:rank=1:n=3:kill",
    "record.before_rename:rank=0:n=1:kill",
    "checkpoint.in_remove:rank=0:n=1:kill",
    "upload.before_rename:rank=0:n=6:kill",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == [0] * WORKERS, log(folder)
    return folder


def killed_in_turn(root: Path, whole: Path, faults: list[str]) -> dict[str, float]:
    """Inject every fault once and return the total cost."""
    attempts = Attempts(root, whole)
    for fault in faults:
        attempts.kill(fault)
    attempts.finish()
    return {
        "kills": len(faults), "lost_steps": max(attempts.lost), "recover_s": statistics.median(attempts.recover),
        "duplicates": attempts.doubled, "missing": attempts.missing, "exit_code": 0, "peak_rss_mb": attempts.rss,
    }  # fmt: skip


class Attempts:
    def __init__(self, root: Path, whole: Path):
        self.root, self.whole, self.runs = root, whole, 0
        self.lost: list[int] = [0]  # steps, by each kill
        self.recover: list[float] = []  # seconds from the start of an attempt to its first step
        self.doubled = self.missing = 0
        self.rss = 0.0
        self._new_run()

    def kill(self, fault: str) -> None:
        """Inject a fault in this run or, if the run ends first, in the next."""
        for _ in range(2):
            if fault.startswith("download"):  # the local disk is lost
                self._until_a_copy_is_there()
                shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
            codes = self._attempt(fault)
            if codes != [0] * WORKERS:
                rank = int(re.search(r"rank=(\d)", fault)[1])
                assert codes[rank] == KILLED, f"{fault}: the workers ended with {codes}\n{log(self.folder)}"
                self._must_be_safe(fault)
                return
            self._must_be_whole()
            self._new_run()
        pytest.fail(f"{fault} does not happen in a whole run")

    def finish(self) -> None:
        assert self._attempt("") == [0] * WORKERS, log(self.folder)
        self._must_be_whole()

    def _new_run(self) -> None:
        self.runs += 1
        self.folder = self.root / f"run{self.runs}"
        self.safe = 0  # steps that the next attempt must not repeat

    def _until_a_copy_is_there(self) -> None:
        if not list(self.folder.glob("second/toy/step-*/MANIFEST.json")):
            assert self._attempt(f"training.before_step:rank=0:step={3 * EVERY}:kill")[0] == KILLED
            self._must_be_safe("until a copy is there")

    def _attempt(self, fault: str) -> list[int]:
        began, before = time.time(), lost_steps(self.folder)
        codes = run(self.folder, fault)
        self.lost.append(lost_steps(self.folder) - before)
        try:
            step, at = first_step_after(self.folder, began)
        except ValueError:  # it was killed before its first step
            return codes
        assert step >= self.safe, f"step {step} is done again, though {self.safe} steps were in a checkpoint"
        self.recover.append(at - began)
        return codes

    def _must_be_safe(self, fault: str) -> None:
        """Assert that a checkpoint verifies, at most an interval (and the current step) behind what was done."""
        done = max(times_begun(self.folder), default=0)
        found, _ = newest(self.folder / "checkpoints")
        copies, _ = newest(self.folder / "second" / "toy")
        if fault.startswith("download"):
            found = copies  # the local one is being downloaded
        self.safe = 0 if found is None else found.position.step
        # One upload runs while another waits: after the loss of the local disk two more intervals may be repeated.
        most = 3 * EVERY if fault.startswith("download") else EVERY
        assert done - self.safe <= most, f"{fault}: {done} steps were done, {self.safe} are safe"
        if copies is not None:
            assert copies.position.step <= done + 1

    def _must_be_whole(self) -> None:
        mine, expected = result(self.folder), result(self.whole)
        assert mine["weights"] == expected["weights"]
        assert mine["average"] == expected["average"]
        assert cells_by_step(self.folder) == cells_by_step(self.whole)
        doubled, missing = every_cell_once_an_epoch(self.folder)
        assert (doubled, missing) == (0, 0)
        self.rss = max(self.rss, mine["peak_rss_mb"])
        for place in ("checkpoints", "second/toy"):
            found, rejected = newest(self.folder / place)
            assert rejected == []
            assert found is not None, place
            assert found.position.step == STEPS, place
            left = [p.name for p in (self.folder / place).glob("step-*")]
            assert len(left) <= 2, f"in {place} stay {left}"


def test_C1_a_handful_of_points_in_a_checkpoint(tmp_path, whole, record):
    record |= killed_in_turn(tmp_path, whole, list(HANDFUL))


@pytest.mark.row("C2")
def test_C2_a_checkpoint_that_is_passed_over_is_counted_for_the_tracker(tmp_path, whole):
    """Its remote copy is valid, and the run resumes from it."""
    assert run(tmp_path, f"training.before_step:rank=0:step={5 * EVERY}:kill")[0] == KILLED
    damaged = newest(tmp_path / "checkpoints")[0].folder
    next(damaged.glob("state-*")).write_bytes(b"")
    assert run(tmp_path) == [0] * WORKERS, log(tmp_path)
    assert [row["ckpt/rejected"] for row in told(tmp_path) if "ckpt/rejected" in row] == [1]
    assert result(tmp_path)["weights"] == result(whole)["weights"]


def test_C1_what_a_kill_left_after_the_last_save_is_removed_at_the_next_start(tmp_path, whole):
    """All steps are done and nothing is saved any more, yet old checkpoints are removed, local and remote."""
    places = [tmp_path / "run" / place for place in ("checkpoints", "second/toy")]
    assert run(tmp_path / "run", f"training.before_step:rank=0:step={9 * EVERY + 1}:kill")[0] == KILLED
    before = newest(places[0])[0].folder
    shutil.copytree(before, tmp_path / before.name)
    assert run(tmp_path / "run") == [0] * WORKERS, log(tmp_path / "run")
    left = [sorted(p.name for p in place.glob("step-*")) for place in places]
    assert before.name not in left[0] + left[1]
    for place in places:
        shutil.copytree(tmp_path / before.name, place / before.name)
    assert run(tmp_path / "run") == [0] * WORKERS, log(tmp_path / "run")
    assert [sorted(p.name for p in place.glob("step-*")) for place in places] == left
    assert result(tmp_path / "run")["weights"] == result(whole)["weights"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_C1_every_point_in_a_step_a_checkpoint_its_retention_and_its_uploads(tmp_path, whole, record):
    faults = every_place(tmp_path / "trace")
    points = {fault.split(":")[0] for fault in faults}
    parts = ("training", "checkpoint", "upload", "download", "record")
    assert points == {p for p in POINTS if p.split(".")[0] in parts}
    record |= {"places": len(points)} | killed_in_turn(tmp_path, whole, faults)


def every_place(folder: Path) -> list[str]:
    """List each point that each worker passes in a run of two checkpoints: the first and last time, and one between."""
    folder.mkdir()
    assert start(folder, two_saves, WORKERS) == [0] * WORKERS, log(folder)
    faults = []
    for rank in range(WORKERS):
        times = json.loads((folder / f"passed-{rank}.json").read_text())
        for point, n in times.items():
            faults += [f"{point}:rank={rank}:n={k}:kill" for k in sorted({1, (n + 1) // 2, n})]
    return [*faults, "download.before_rename:rank=0:n=1:kill", "download.before_rename:rank=0:n=6:kill"]
