"""What hostile files cannot do to who looks at them. What is said of each kind of fault: `faulty_*.py`."""

from __future__ import annotations

import os
import pickle

import h5py
import numpy as np
import pytest
from helpers.files.h5ad_cases import look, save, told

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.row("C11")
def test_a_pickle_in_a_file_is_never_run(tmp_path):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    path = save(tmp_path / "a.h5ad")
    with h5py.File(path, "a") as f:
        f["uns/payload"] = np.void(pickle.dumps(Canary()))
        f["obs"].attrs["payload"] = np.void(pickle.dumps(Canary()))
    text = told(look(path, "cell_type"))
    assert "/uns/payload holds opaque bytes (a pickle?); they are never unpickled" in text
    assert not (tmp_path / "canary").exists()


def test_nothing_of_a_file_commands_the_terminal(tmp_path):
    path = save(tmp_path / "a.h5ad", cell_type=["\x1b[2J\x1b]0;owned\x07"] * 20 + ["<script>\u202e"] * 20)
    text = look(path, "cell_type").text()
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[2J" in text
    assert "2 classes of cell_type hold markup or control characters" in text
