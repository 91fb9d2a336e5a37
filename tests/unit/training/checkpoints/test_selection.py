"""The checkpoint that a run resumes from, and what is reported about those that do not verify."""

from __future__ import annotations

import pytest
from helpers.stages.committed import commit

from pipeline.config.resources import CheckpointStorage
from pipeline.training.checkpoints.remote import Remote
from pipeline.training.checkpoints.selection import CheckpointSelection
from scldm.errors import InputError


def selection(root, remote=None, *, strict=False) -> CheckpointSelection:
    return CheckpointSelection(root, remote, keep_best=1, strict=strict)


def damage(folder) -> None:
    (folder / "state.pt").write_bytes(b"WEIGHTS")


@pytest.mark.row("C2")
def test_C2_every_damaged_checkpoint_is_counted_and_named_and_the_one_before_is_taken(tmp_path, caplog):
    kept, *broken = (commit(tmp_path, step) for step in (4, 8, 12))
    for folder in broken:
        damage(folder)
    selected = selection(tmp_path)
    assert selected.newest().folder == kept
    assert len(selected.rejected) == 2
    assert all(f"checkpoint passed over: {folder}: state.pt has another sha256" in caplog.text for folder in broken)


@pytest.mark.row("C2")
def test_C2_under_strict_resume_damage_is_an_error_that_names_every_damaged_checkpoint_and_the_setting(tmp_path):
    kept, *broken = (commit(tmp_path, step) for step in (4, 8, 12))
    for folder in broken:
        damage(folder)
    with pytest.raises(InputError) as error:
        selection(tmp_path, strict=True).newest()
    assert all(f"{folder}: state.pt has another sha256" in str(error.value) for folder in broken)
    assert kept.name in str(error.value)
    assert "checkpoints.strict_resume=false" in str(error.value)


def test_strict_resume_ignores_a_checkpoint_that_was_never_finished(tmp_path):
    """A kill during a save leaves such a folder; it is not damage."""
    kept, unfinished = commit(tmp_path, 4), commit(tmp_path, 8)
    (unfinished / "MANIFEST.json").unlink()
    assert selection(tmp_path, strict=True).newest().folder == kept


def test_strict_resume_also_covers_remote_storage(tmp_path):
    remote = Remote(CheckpointStorage(storage_path=str(tmp_path / "there")), "run")
    kept = commit(tmp_path / "here", 4)
    damage(commit(tmp_path / "there" / "run", 8))
    selected = selection(tmp_path / "here", remote)
    assert selected.newest().folder == kept
    assert len(selected.rejected) == 1
    assert selected.not_copied == kept
    with pytest.raises(InputError, match=r"in remote storage\): .*step-00000008"):
        selection(tmp_path / "here", remote, strict=True).newest()


class Unreachable(Remote):
    """Lists its checkpoints, but every download fails."""

    def get(self, name, root):
        raise OSError("timed out")


def test_a_failed_download_is_not_damage_and_does_not_start_the_run_from_the_beginning(tmp_path):
    remote = Unreachable(CheckpointStorage(storage_path=str(tmp_path / "there")), "run")
    commit(tmp_path / "there" / "run", 8)
    with pytest.raises(OSError, match=r"no checkpoint is local.*step-00000008.*timed out"):
        selection(tmp_path / "here", remote).newest()
    kept = commit(tmp_path / "here", 4)
    selected = selection(tmp_path / "here", remote, strict=True)
    assert selected.newest().folder == kept
    assert selected.rejected == []
