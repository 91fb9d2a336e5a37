"""Which checkpoint a run goes on from, and what is said of those that do not verify."""

from __future__ import annotations

import pytest
from helpers.stages.committed import commit

from pipeline.config.resources import CheckpointStorage
from pipeline.training.checkpoints.remote import Remote
from pipeline.training.checkpoints.selection import Choice
from scldm.errors import InputError


def choice(root, remote=None, *, strict=False) -> Choice:
    return Choice(root, remote, keep_best=1, strict=strict)


def damage(folder) -> None:
    (folder / "state.pt").write_bytes(b"WEIGHTS")


@pytest.mark.row("C2")
def test_C2_every_damaged_checkpoint_is_counted_and_named_and_the_one_before_is_taken(tmp_path, capsys):
    kept, *broken = (commit(tmp_path, step) for step in (4, 8, 12))
    for folder in broken:
        damage(folder)
    looked = choice(tmp_path)
    assert looked.newest().folder == kept
    assert len(looked.rejected) == 2
    said = capsys.readouterr().out
    assert all(f"checkpoint passed over: {folder}: state.pt has another sha256" in said for folder in broken)


@pytest.mark.row("C2")
def test_C2_under_strict_resume_damage_is_an_error_that_names_all_of_it_and_the_way_on(tmp_path):
    kept, *broken = (commit(tmp_path, step) for step in (4, 8, 12))
    for folder in broken:
        damage(folder)
    with pytest.raises(InputError) as error:
        choice(tmp_path, strict=True).newest()
    assert all(f"{folder}: state.pt has another sha256" in str(error.value) for folder in broken)
    assert f"the newest here that does is {kept.name}" in str(error.value)
    assert "checkpoints.strict_resume=false" in str(error.value)


def test_strict_resume_does_not_mind_a_checkpoint_that_was_never_finished(tmp_path):
    """A kill while one is written leaves such a folder: nobody's damage."""
    kept, unfinished = commit(tmp_path, 4), commit(tmp_path, 8)
    (unfinished / "MANIFEST.json").unlink()
    assert choice(tmp_path, strict=True).newest().folder == kept


def test_strict_resume_holds_of_the_second_place_too(tmp_path):
    remote = Remote(CheckpointStorage(storage_path=str(tmp_path / "there")), "run")
    kept = commit(tmp_path / "here", 4)
    damage(commit(tmp_path / "there" / "run", 8))
    looked = choice(tmp_path / "here", remote)
    assert looked.newest().folder == kept
    assert len(looked.rejected) == 1
    assert looked.not_copied == kept
    with pytest.raises(InputError, match=r"of the second place\): .*step-00000008"):
        choice(tmp_path / "here", remote, strict=True).newest()


class Unreachable(Remote):
    """Lists what it has, and gives nothing."""

    def get(self, name, root):
        raise OSError("timed out")


def test_what_cannot_be_fetched_is_no_damage_and_no_reason_to_start_from_nothing(tmp_path):
    remote = Unreachable(CheckpointStorage(storage_path=str(tmp_path / "there")), "run")
    commit(tmp_path / "there" / "run", 8)
    with pytest.raises(OSError, match=r"no checkpoint is here.*step-00000008.*timed out"):
        choice(tmp_path / "here", remote).newest()
    kept = commit(tmp_path / "here", 4)
    looked = choice(tmp_path / "here", remote, strict=True)
    assert looked.newest().folder == kept
    assert looked.rejected == []
