"""`scldm validate-data` on broken and hostile files: told, refused by ingest, and nothing of them is run."""

from __future__ import annotations

import os
import pickle

import h5py
import numpy as np
import pytest
from h5ad_cases import G, N, look, save, told

from pipeline.data.anndata import read_h5ad
from pipeline.job import H5adSource
from pipeline.stage import InputError

pytestmark = pytest.mark.filterwarnings("ignore")


def swap(file, name, values):
    del file[name]
    file[name] = values


def far_indices(f):
    f["X/indices"][3] = 99


def negative_indices(f):
    f["X/indices"][3] = -1


def pointers_back(f):
    f["X/indptr"][3] = 100


def short_pointers(f):
    swap(f, "X/indptr", f["X/indptr"][:-1])


def short_data(f):
    swap(f, "X/data", f["X/data"][:-5])


def text_data(f):
    swap(f, "X/data", np.array([b"x"] * len(f["X/data"])))


def short_obs(f):
    for key in ("_index", "cell_type/codes"):
        swap(f, f"obs/{key}", f[f"obs/{key}"][:-1])


def short_column(f):
    swap(f, "obs/cell_type/codes", f["obs/cell_type/codes"][:-1])


def no_ids(f):
    del f["var/_index"]


def no_x(f):
    del f["X"]


def external_link(f):
    del f["X"]
    f["X"] = h5py.ExternalLink("/etc/passwd", "/")


def link_in_uns(f):
    f["uns/x"] = h5py.ExternalLink("other.h5", "/secret")


def soft_link(f):
    f["uns/x"] = h5py.SoftLink("/nowhere")


def virtual(f):
    layout = h5py.VirtualLayout((N, G), np.float32)
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "x", (N, G))
    del f["X"]
    f.create_virtual_dataset("X", layout)


def stored_outside(f):
    del f["X"]
    f.create_dataset("X", (N, G), np.float32, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def bomb(f):
    f.create_dataset("uns/big", (1 << 40,), np.float32, chunks=(1 << 20,), compression="gzip")


def huge_shape(f):
    f["X"].attrs["shape"] = [1 << 40, G]


def deep(f):
    f.create_group("uns/" + "/".join("a" * 40))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (far_indices, "1 indices of X are outside its 6 (first: entry 3: index 99)"),
        (negative_indices, "1 indices of X are outside its 6 (first: entry 3: index -1)"),
        (pointers_back, "steps back"),
        (short_pointers, "X/indptr has 40 entries, 41 are right"),
        (short_data, "for 235 data and 240 indices"),
        (text_data, "X is of the wrong type (data |S1"),
        (short_obs, "lengths differ: obs and var are for 39 x 6, X is 40 x 6"),
        (short_column, "1 columns of obs are not 40 long (first: cell_type: 39)"),
        (no_ids, "var has no index of names"),
        (no_x, "the file has no X; it holds no counts"),
        (external_link, "/X is a link to another file (/etc/passwd), which could be any file of yours"),
        (link_in_uns, "/uns/x is a link to another file (other.h5)"),
        (soft_link, "/uns/x is a soft link"),
        (virtual, "/X is a virtual dataset"),
        (stored_outside, "/X is stored in another file (/etc/passwd)"),
        (bomb, "/uns/big declares 4096.0 GiB and stores 0 bytes"),
        (huge_shape, "X declares 1,099,511,627,776 x 6"),
        (deep, "groups deep; at most 16 are read"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_broken_and_hostile_files_are_told_and_ingest_refuses_them(tmp_path, harm, words):
    path = save(tmp_path / "a.h5ad")
    with h5py.File(path, "a") as f:
        harm(f)
    found = look(path)
    assert found.errors
    assert words in told(found)
    with pytest.raises(InputError):  # the same checks
        list(read_h5ad(H5adSource(type="h5ad", path=str(path))).chunks())


def test_order_repeats_and_zeros_are_warnings(tmp_path):
    path = save(tmp_path / "a.h5ad")
    with h5py.File(path, "a") as f:
        f["X/indices"][:2] = [1, 0]
        f["X/indices"][7] = 0
        f["X/data"][9] = 0
    found = look(path)
    assert not found.errors
    for words in ("1 entries of X come twice", "1 indices of X are not in order", "1 stored values of X are zero"):
        assert words in told(found)


def test_what_is_no_hdf5_or_cut_short_is_said(tmp_path):
    whole = save(tmp_path / "a.h5ad").read_bytes()
    for name, content, words in [
        ("text", b"hello", "not an HDF5 file"),
        ("nothing", b"", "the file is empty"),
        ("cut", whole[: len(whole) // 2], "the file is truncated"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert words in told(look(tmp_path / name))


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
