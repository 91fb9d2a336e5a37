"""The targets of `make fuzz`, for seconds and without coverage: seeds, what was found, and the same odd inputs."""

from __future__ import annotations

import random
from pathlib import Path

import edits
import pytest
import targets

from pipeline.data.examine import Question, examine

FOUND = Path(targets.__file__).parent / "found"
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.row("D:fuzz")]
INPUTS = 60


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, left out or put in."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        at = draw.randint(0, len(changed))
        piece = bytes(draw.randrange(256) for _ in range(draw.randint(0, 6)))
        changed[at : at + draw.randint(0, 4)] = piece
    return bytes(changed)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_odd_inputs_are_answered(name):
    draw = random.Random(name)
    known = [*targets.seeds(name), *(p.read_bytes() for p in sorted((FOUND / name).glob("*")))]
    for data in known:
        targets.run(name, data)
    for _ in range(INPUTS):
        targets.run(name, mutated(draw.choice(known), draw))


def test_an_edit_changes_the_file_and_none_leaves_it_sound(tmp_path):
    """Else the fuzzer would go over one sound file for ever."""
    sound = targets.sound_h5ad()
    assert edits.edited(sound, b"") == sound
    (tmp_path / "a.h5ad").write_bytes(sound)
    [found] = examine(Question(str(tmp_path / "a.h5ad"), labels=targets.LABELS))
    assert found.errors == []
    for kind in range(8):
        assert any(edits.edited(sound, bytes([kind, i, 3, 1, 4])) != sound for i in range(20)), kind
