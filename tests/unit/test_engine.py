"""What our engine relies on in DeepSpeed's private parts, and the checkpoint rules that need no second process."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.stage import InputError
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Found, Position, check_fits, newest, verify

POSITION = Position(step=4, epoch=0, offset=4, world_size=2, config_hash="a", zero_stage=1)


def test_deepspeed_still_has_the_switch_that_spares_a_cpu_the_compiler():
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


def commit(root: Path, step: int, content: bytes = b"weights") -> Path:
    folder = root / f"step-{step:08d}-w2-00000000"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(content)
    files = {"state.pt": (len(content), checkpoint._sha256(folder / "state.pt"))}
    position = asdict(POSITION) | {"step": step}
    (folder / "MANIFEST.json").write_text(json.dumps({"schema": 1, "position": position, "files": files}))
    return folder


def test_the_newest_checkpoint_that_verifies_is_taken(tmp_path):
    commit(tmp_path, 4)
    commit(tmp_path, 8)
    (tmp_path / "step-00000012-w2-00000000").mkdir()  # never committed
    found, rejected = newest(tmp_path)
    assert found.position.step == 8
    assert rejected == []


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "state.pt").unlink(), "state.pt is missing"),
        (lambda f: (f / "state.pt").write_bytes(b"weight"), "has 6 bytes, not 7"),
        (lambda f: (f / "state.pt").write_bytes(b"Weights"), "another sha256"),
        (lambda f: (f / "MANIFEST.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "MANIFEST.json").write_text('{"schema": 9}'), "schema 9, this version reads 1"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path, harm, said):
    commit(tmp_path, 4)
    last = commit(tmp_path, 8)
    harm(last)
    found, rejected = newest(tmp_path)
    assert found.position.step == 4
    assert said in rejected[0]
    assert said in verify(last)


def test_only_the_newest_checkpoints_stay_and_never_the_one_being_written(tmp_path):
    for step in (4, 8, 12):
        commit(tmp_path, step)
    (tmp_path / "step-00000016-w2-00000000").mkdir()  # being written
    (tmp_path / "step-00000006-w2-00000000").mkdir()  # left by a killed attempt
    checkpoint._retain(tmp_path, 2)
    assert [int(p.name.split("-")[1]) for p in sorted(tmp_path.iterdir())] == [8, 12, 16]


def test_another_number_of_workers_is_refused_with_the_remedy():
    found = Found(Path("run/checkpoints/step-4"), POSITION)
    with pytest.raises(InputError, match=r"run with resources\.workers=2"):
        check_fits(found, Position(**{**asdict(POSITION), "world_size": 4}))
    with pytest.raises(InputError, match="another configuration"):
        check_fits(found, Position(**{**asdict(POSITION), "config_hash": "b"}))
