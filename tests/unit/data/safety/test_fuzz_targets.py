"""The targets of `make fuzz`, for seconds and without coverage: seeds, what was found, and the same odd inputs."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import edits
import h5py
import numpy as np
import pytest
import targets

from pipeline.data.inspection.examine import Question, examine
from pipeline.data.safety.hdf5_strings import text_problem
from pipeline.data.safety.memory_limit import memory_limit

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


MEASURED = """
import resource, sys, targets
from pathlib import Path
targets.run("h5ad", b"")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    targets.run("h5ad", Path(path).read_bytes())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.row("D:huge-declared")
def test_a_file_that_says_it_has_gigabytes_of_text_gets_no_such_memory():
    """Each of these took three or four."""
    files = [p for word in ("larger", "longer", "heap") for p in sorted((FOUND / "h5ad").glob(f"*{word}*"))]
    assert len(files) >= 4
    path = os.pathsep.join([str(FOUND.parent), str(FOUND.parents[2])])
    done = subprocess.run([sys.executable, "-c", MEASURED, *map(str, files)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path}, timeout=120, check=True)  # fmt: skip
    assert int(done.stdout.split()[-1]) < 400, "MB"


def test_memory_is_limited_inside_and_not_after():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryError), memory_limit(64 << 20):
        np.ones(1 << 26)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with memory_limit(1 << 30):
        assert np.ones(1 << 24).sum() == 1 << 24


def test_an_edit_changes_the_file_and_none_leaves_it_sound(tmp_path):
    """Else the fuzzer would go over one sound file for ever."""
    sound = targets.sound_h5ad()
    assert edits.edited(sound, b"") == sound
    (tmp_path / "a.h5ad").write_bytes(sound)
    [found] = examine(Question(str(tmp_path / "a.h5ad"), labels=targets.LABELS))
    assert found.errors == []
    for kind in range(8):
        value = b"\xff" if kind == 7 else b""  # of a raw edit; without one it writes zeros, of which a file has many
        assert any(edits.edited(sound, bytes([kind, i, 3, 1, 4]) + value) != sound for i in range(20)), kind


@pytest.mark.parametrize(
    "stored",
    [{}, {"chunks": (4,)}, {"compression": "gzip"}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"}],
)  # fmt: skip
@pytest.mark.parametrize("before", [0, 512])
def test_sound_texts_are_sound_however_they_are_stored(tmp_path, stored, before):
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=before) as f:
        f.create_dataset("x", data=["", "ENSG1", "a longer name"] * 5, dtype=h5py.string_dtype(), **stored)
    with h5py.File(tmp_path / "a.h5") as f:
        assert text_problem(f["x"]) is None
