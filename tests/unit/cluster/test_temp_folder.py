"""Ray gets a folder that is short enough for its sockets."""

import os
import socket

import pytest

from pipeline.cluster.temp_folder import LONGEST, short_temp_folder
from scldm.errors import InputError

SESSION = "/ray/session_2026-11-29_23-17-05_123456_1234567/sockets/plasma_store"


def test_the_longest_folder_that_is_left_to_ray_has_room_for_its_sockets(tmp_path):
    assert short_temp_folder({"TMPDIR": "/" + "x" * (LONGEST - 1)}) is None
    folder = "/tmp/" + "x" * (LONGEST - len("/tmp/"))
    os.makedirs(os.path.dirname(folder + SESSION), exist_ok=True)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(folder + SESSION)
    finally:
        import shutil

        shutil.rmtree(folder)


def test_a_longer_one_is_replaced_by_a_short_one():
    found = short_temp_folder({"TMPDIR": "/scratch/" + "x" * LONGEST})
    assert found == f"/tmp/ray-{os.getuid()}"
    assert len(found) <= LONGEST
    assert os.access(found, os.W_OK)


def test_a_folder_that_the_user_chose_is_never_replaced():
    assert short_temp_folder({"RAY_TMPDIR": "/short", "TMPDIR": "/" + "x" * 90}) is None
    with pytest.raises(InputError, match=r"RAY_TMPDIR=/x+ has 90 characters"):
        short_temp_folder({"RAY_TMPDIR": "/" + "x" * 89})


def test_without_a_short_folder_the_setting_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("pipeline.cluster.temp_folder.SHORT", tmp_path / "absent")
    with pytest.raises(InputError, match="set RAY_TMPDIR to a short folder"):
        short_temp_folder({"TMPDIR": "/" + "x" * 90})
