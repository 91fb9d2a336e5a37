"""Every kind of damage to every file of a checkpoint is detected, and rejects that checkpoint and no other."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.stages.committed import POSITION, commit, steps

from pipeline.training.checkpoints import manifest as checkpoint
from pipeline.training.checkpoints.manifest import (
    DIGEST,
    MANIFEST,
    TrainingPosition,
    best,
    committed,
    newest,
    retain,
    verify,
)
from pipeline.training.engine.state_files import shard_name, write_tensors
from scldm.errors import InputError

FILES = (shard_name(0, 2), shard_name(1, 2), "average.safetensors", "random-00000.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Two checkpoints as training commits them, of steps 4 and 8."""
    root = tmp_path_factory.mktemp("saved")
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=0, world_size=1)

    def write(folder: Path) -> checkpoint.WrittenFiles:
        tensors = {name: {"weight/0/x": torch.full((50,), float(i))} for i, name in enumerate(FILES)}
        return {name: write_tensors(folder / name, t) for name, t in tensors.items()}

    try:
        for step in (4, 8):
            position = TrainingPosition(**{**asdict(POSITION), "step": step})
            more = {"guard": {"losses": [1.5, float("nan")]}, "by worker": {10: 1, 9: 2}}
            made = checkpoint.save(root / "checkpoints", position, write, metrics={"val/loss": 1 / 3}, more=more)
            assert isinstance(made, Path)
    finally:
        dist.destroy_process_group()
    return root / "checkpoints"


@pytest.fixture
def root(saved, tmp_path) -> Path:
    """A copy to spoil."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def last(root: Path) -> Path:
    return max(root.glob("step-*"))


def flipped(data: bytes, bit: int) -> bytes:
    spoiled = bytearray(data)
    spoiled[bit // 8] ^= 1 << bit % 8
    return bytes(spoiled)


def swap(path: Path) -> None:
    """With a file of the same size of another worker."""
    other = path.with_name(FILES[1] if path.name != FILES[1] else FILES[0])
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut to nothing": lambda p: p.write_bytes(b""),
    "cut to half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "cut by a byte": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "a byte more": lambda p: p.write_bytes(p.read_bytes() + b"0"),
    "a bit flipped": lambda p: p.write_bytes(flipped(p.read_bytes(), 8 * (p.stat().st_size // 2))),
    "deleted": lambda p: p.unlink(),
    "a folder in its place": lambda p: (p.unlink(), p.mkdir()),
    "swapped with another worker's": swap,
}


@pytest.mark.row("C2")
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_C2_a_changed_file_rejects_only_its_checkpoint(root, file, damage):
    DAMAGE[damage](last(root) / file)
    found, rejected = newest(root)
    assert found.position.step == 4
    assert len(rejected) == 1
    assert last(root).name in rejected[0]


@pytest.mark.row("C2")
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_C2_an_unreadable_file_rejects_only_its_checkpoint(root, monkeypatch, code):
    digest_of, damaged = checkpoint.file_digest, last(root) / FILES[1]

    def read(path: Path) -> str:
        if path == damaged:
            raise OSError(code, os.strerror(code))
        return digest_of(path)

    monkeypatch.setattr(checkpoint, "file_digest", read)
    found, rejected = newest(root)
    assert found.position.step == 4
    assert f"{FILES[1]} cannot be read: " in rejected[0]


@pytest.mark.row("C2")
def test_C2_a_damaged_best_checkpoint_is_named_and_the_next_best_is_used(root):
    one, two = sorted(root.glob("step-*"))
    assert best(root)[0].folder == two, "of two that are equally good the newer"
    (two / FILES[0]).unlink()
    found, rejected = best(root)
    assert found.folder == one
    assert rejected == [f"{two.name}: {FILES[0]} is missing"]


@pytest.mark.row("C2", "C3")
def test_C3_a_truncated_manifest_is_passed_over(root):
    whole = (last(root) / MANIFEST).read_bytes()
    for size in range(len(whole)):
        (last(root) / MANIFEST).write_bytes(whole[:size])
        found, rejected = newest(root)
        assert found.position.step == 4, size
        assert "its manifest cannot be read" in rejected[0]


@pytest.mark.row("C2", "C3")
def test_C3_a_flipped_bit_in_a_manifest_is_detected_or_changes_nothing(root):
    """Nothing: between the tokens of JSON, or in the name of the sum itself."""
    path = last(root) / MANIFEST
    whole = path.read_bytes()
    meant = json.loads(whole)
    meant.pop(DIGEST)
    rng, harmless = random.Random(0), 0
    for bit in rng.sample(range(8 * len(whole)), 600):
        path.write_bytes(flipped(whole, bit))
        problem = verify(path.parent)
        if problem is None:
            harmless += 1
            kept = {k: v for k, v in json.loads(path.read_bytes()).items() if k in meant}
            assert json.dumps(kept, sort_keys=True) == json.dumps(meant, sort_keys=True), f"bit {bit}"
    assert harmless < 60, "most of a manifest is not white space"


@pytest.mark.row("C3")
@pytest.mark.parametrize(
    "text",
    ["null", "[]", "7", '"step"', "{}", '{"schema": 2}', '{"schema": 2, "files": [1]}', '{"schema": "2"}', "\xff"],
)
def test_C3_json_that_is_not_a_manifest_is_passed_over_and_ignored(root, text):
    (last(root) / MANIFEST).write_text(text, encoding="latin-1")
    found, rejected = newest(root)
    assert found.position.step == 4
    assert len(rejected) == 1
    assert [f.position.step for f in committed(root)] == [4]


@pytest.mark.row("C3")
def test_C3_a_checkpoint_of_a_newer_version_is_an_error(root):
    path = last(root) / MANIFEST
    path.write_text(json.dumps({"schema": 3, "files": "elsewhere"}))
    with pytest.raises(InputError, match=r"newer version of scldm \(schema 3, this version reads 2\); upgrade scldm"):
        newest(root)
    shutil.move(path.parent, path.parent.with_name("moved-away"))
    assert newest(root)[0].position.step == 4


@pytest.mark.row("C9")
def test_C9_fifty_checkpoints_leave_three_and_always_one_that_verifies(tmp_path):
    """Two of the last and one of the best; each is damaged after the next one came, but for the best."""
    rng, most = random.Random(3), 0
    losses = [rng.uniform(1, 2) for _ in range(50)]
    for i, loss in enumerate(losses, start=1):
        folder = commit(tmp_path, 4 * i, loss=loss)
        retain(tmp_path, newest=folder, keep_last=2, keep_best=1)
        left = steps(tmp_path)
        most = max(most, len(left))
        assert 4 * i in left
        assert newest(tmp_path)[0].position.step == 4 * i
        assert 4 * (1 + losses.index(min(losses[:i]))) in left, "the best went"
        if i % 7 == 0 and loss > min(
            losses[:i]
        ):  # what is damaged takes a place of the last ones, never that of the one just written
            (folder / "state.pt").write_bytes(b"")
    assert most <= 3
    assert best(tmp_path)[0].metrics["val/loss"] == min(losses)


@pytest.mark.row("C10")
def test_C10_another_configuration_is_refused_with_both_names(root):
    """Genes, labels and widths are part of a stage's version and so of its folder: this is for one that was moved."""
    found = newest(root)[0]
    with pytest.raises(InputError, match=re.escape(f"{found.folder} was written under another configuration (a; this")):
        checkpoint.check_fits(found, TrainingPosition(**{**asdict(found.position), "config_hash": "another"}))
