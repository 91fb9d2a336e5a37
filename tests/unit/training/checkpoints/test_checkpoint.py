"""When a checkpoint exists, which one is used, and which ones are kept."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from helpers.stages.committed import POSITION, commit, steps

from pipeline.training.checkpoints.manifest import check_fits, newest, read, retain, verify
from scldm.errors import InputError


def test_the_newest_checkpoint_that_verifies_is_used(tmp_path):
    commit(tmp_path, 4)
    commit(tmp_path, 8)
    (tmp_path / "step-00000012-w2-00000000").mkdir()  # never committed
    found, rejected = newest(tmp_path)
    assert found.position.step == 8
    assert rejected == []


@pytest.mark.row("C2", "C3")
@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda f: (f / "state.pt").unlink(), "state.pt is missing"),
        (lambda f: (f / "state.pt").write_bytes(b""), "has 0 bytes, not 7"),
        (lambda f: (f / "state.pt").write_bytes(b"weight"), "has 6 bytes, not 7"),
        (lambda f: (f / "state.pt").write_bytes(b"Weights"), "another sha256"),
        (lambda f: (f / "MANIFEST.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "MANIFEST.json").write_text('{"schema": 1}'), "it has schema 1, this version reads 2"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path, harm, problem):
    commit(tmp_path, 4)
    last = commit(tmp_path, 8)
    harm(last)
    found, rejected = newest(tmp_path)
    assert found.position.step == 4
    assert problem in rejected[0]
    assert problem in verify(last)


def test_only_the_newest_checkpoints_are_kept_and_one_being_written_is_not_removed(tmp_path):
    for step in (4, 8, 12):
        last = commit(tmp_path, step)
    (tmp_path / "step-00000016-w2-00000000").mkdir()  # being written
    (tmp_path / "step-00000006-w2-00000000").mkdir()  # left by a killed attempt
    retain(tmp_path, newest=last, keep_last=2, keep_best=0)
    assert steps(tmp_path) == [8, 12, 16]


def test_the_best_by_validation_loss_are_kept_besides_the_last(tmp_path):
    for step, loss in ((4, 3.0), (8, 1.0), (12, None), (16, 2.0), (20, 4.0)):
        last = commit(tmp_path, step, loss=loss)
    retain(tmp_path, newest=last, keep_last=1, keep_best=2)
    assert steps(tmp_path) == [8, 16, 20]


def test_a_checkpoint_being_uploaded_is_kept(tmp_path):
    flying = commit(tmp_path, 4)
    commit(tmp_path, 8)
    retain(tmp_path, newest=commit(tmp_path, 12), keep_last=1, keep_best=0, busy=frozenset({flying.name}))
    assert steps(tmp_path) == [4, 12]


@pytest.mark.row("C9")
def test_a_damaged_newer_checkpoint_does_not_remove_the_one_just_written(tmp_path):
    """An attempt that walked back past step 12 writes step 8 again: both 8 and the damaged 12 are left alone."""
    damaged = commit(tmp_path, 12)
    (damaged / "state.pt").write_bytes(b"Weights")
    retain(tmp_path, newest=commit(tmp_path, 8), keep_last=1, keep_best=0)
    assert newest(tmp_path)[0].position.step == 8


@pytest.mark.row("C10")
def test_another_configuration_is_refused_and_another_number_of_workers_is_not(tmp_path):
    found = read(commit(tmp_path, 4))
    check_fits(found, replace(POSITION, world_size=4))
    with pytest.raises(InputError, match="another configuration"):
        check_fits(found, replace(POSITION, config_hash="b"))


def test_a_folder_without_manifest_is_not_a_checkpoint(tmp_path):
    """Retention removes the manifest first: killed in between, it leaves nothing that looks complete."""
    folder = commit(tmp_path, 4)
    (folder / "MANIFEST.json").unlink()
    assert newest(tmp_path) == (None, [])
    shutil.rmtree(folder)
