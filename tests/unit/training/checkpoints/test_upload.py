"""Checkpoints are copied to a second place beside training, and found there again."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from helpers.servers.s3_server import REGION, free_port, moto_server
from helpers.stages.committed import commit, steps

from pipeline.config.resources import CheckpointStorage
from pipeline.training.checkpoints.manifest import MANIFEST, newest, verify
from pipeline.training.checkpoints.remote import Remote, check_storage
from pipeline.training.checkpoints.upload import Uploader
from scldm.errors import InputError

RUN = "job/train_vae/v"


class Slow(Remote):
    """Uploads that wait for `gate`, and fail the first `faults` times."""

    def __init__(self, root: Path, faults: int = 0):
        super().__init__(CheckpointStorage(storage_path=str(root)), RUN)
        self.gate, self.faults, self.began = threading.Event(), faults, threading.Event()
        self.gate.set()

    def put(self, folder: Path) -> None:
        self.began.set()
        self.gate.wait()
        if self.faults:
            self.faults -= 1
            raise OSError("the place does not answer")
        super().put(folder)


def uploader(here: Path, remote: Remote, said: list[str] | None = None, **more) -> Uploader:
    settings = {"tries": 3, "first_wait": 0.01, "tell": (said if said is not None else []).append, **more}
    return Uploader(here, remote, (2, 1), **settings)


def test_a_checkpoint_arrives_whole_and_old_ones_go_except_the_best(tmp_path):
    here, remote = tmp_path / "here", Slow(tmp_path / "there")
    there = tmp_path / "there" / RUN
    up = uploader(here, remote)
    for step, loss in ((4, 1.0), (8, 3.0), (12, 2.0), (16, 4.0)):
        up.put(commit(here, step, loss=loss))
        while up.busy():
            time.sleep(0.01)
    assert up.close(10)
    assert steps(there) == [4, 12, 16]
    assert verify(newest(there)[0].folder) is None
    assert len(up.seconds) == 4


@pytest.mark.row("C7")
def test_handing_over_takes_no_time_and_a_newer_checkpoint_takes_the_place_of_one_that_waits(tmp_path):
    here, remote, said = tmp_path / "here", Slow(tmp_path / "there"), []
    up = uploader(here, remote, said)
    remote.gate.clear()
    flying, left_out, waiting = (commit(here, step) for step in (4, 8, 12))
    began = time.monotonic()
    up.put(flying)
    assert remote.began.wait(5)
    up.put(left_out)
    up.put(waiting)
    assert time.monotonic() - began < 2
    assert up.busy() == {flying.name, waiting.name}
    remote.gate.set()
    assert up.close(10)
    assert steps(tmp_path / "there" / RUN) == [4, 12]
    assert "is left out" in said[0]


def test_an_upload_is_tried_again(tmp_path):
    said: list[str] = []
    up = uploader(tmp_path / "here", Slow(tmp_path / "there", faults=2), said)
    up.put(commit(tmp_path / "here", 4))
    assert up.close(10)
    assert steps(tmp_path / "there" / RUN) == [4]
    assert [line.split(":")[2].strip() for line in said] == ["try 1 of 3", "try 2 of 3"]


def test_a_failed_upload_is_said_loudly_and_remembered_until_a_later_one_arrives(tmp_path):
    here, said = tmp_path / "here", []
    up = uploader(here, Slow(tmp_path / "there", faults=3), said)
    first = commit(here, 4)
    up.put(first)
    assert not up.close(10)
    assert any(line.startswith("CHECKPOINT UPLOAD FAILED") and first.name in line for line in said)
    again = uploader(here, Slow(tmp_path / "there"))
    assert again.pending() == [first.name]
    again.put(commit(here, 8))
    assert again.close(10)
    assert again.pending() == []


def test_the_end_waits_for_the_last_upload_only_so_long(tmp_path):
    here, remote, said = tmp_path / "here", Slow(tmp_path / "there"), []
    remote.gate.clear()
    up = uploader(here, remote, said)
    up.put(commit(here, 4))
    began = time.monotonic()
    assert not up.close(0.2)
    assert time.monotonic() - began < 5
    assert "not done after 0 s" in said[-1]
    remote.gate.set()


@pytest.mark.row("C1")
def test_half_an_upload_is_no_checkpoint(tmp_path):
    """The manifest goes last, so a killed upload leaves nothing that would be taken."""
    remote = Remote(CheckpointStorage(storage_path=str(tmp_path / "there")), RUN)
    folder = commit(tmp_path / "here", 4)
    put, sent = remote._put, []

    def dies(path: Path, target: str) -> None:
        if sent:
            raise KeyboardInterrupt
        sent.append(target)
        put(path, target)

    remote._put = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        remote.put(folder)
    assert remote.names() == []
    assert not sent[0].endswith(MANIFEST)


def test_what_a_kill_left_in_the_second_place_goes_with_the_next_copy(tmp_path):
    """Half a copy; half a removal; and one whose folder here is just losing its files."""
    here, there = tmp_path / "here", tmp_path / "there" / RUN
    remote = Slow(tmp_path / "there")
    for step in (4, 8, 12):
        remote.put(commit(here, step))
    (there / "step-00000004-w2-00000000" / MANIFEST).unlink()  # its removal was cut short
    (there / "step-00000010-w2-00000000").mkdir()  # its copy was cut short
    (here / "step-00000008-w2-00000000" / MANIFEST).unlink()  # retention is at work here
    up = uploader(here, remote)
    up.put(commit(here, 16))
    assert up.close(10)
    assert steps(there) == [12, 16]


def test_what_a_kill_left_after_the_last_copy_goes_without_another(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there" / RUN
    remote, said = Slow(tmp_path / "there"), []
    for step, loss in ((4, 1.0), (8, 3.0), (12, 2.0), (16, 4.0)):
        remote.put(commit(here, step, loss=loss))
    remote.gate.clear()  # no copy is made
    up = uploader(here, remote, said)
    up.tidy(newest(here)[0].folder)
    assert up.close(10)
    assert steps(there) == [4, 12, 16]
    assert (said, up.seconds) == ([], [])


@pytest.fixture
def bucket(monkeypatch):
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with moto_server() as address:
        client = boto3.client("s3", endpoint_url=address, region_name=REGION)
        client.create_bucket(Bucket="lab", CreateBucketConfiguration={"LocationConstraint": REGION})
        yield {"endpoint": address, "addressing": "path", "tries": 2}


def test_s3_holds_checkpoints_as_a_folder_does(tmp_path, bucket):
    storage = CheckpointStorage(storage_path="s3://lab/runs", region=REGION, s3=bucket)
    check_storage(storage, RUN)
    remote = Remote(storage, RUN)
    here = tmp_path / "here"
    up = uploader(here, remote)
    for step in (4, 8, 12, 16):
        up.put(commit(here, step))
        while up.busy():
            time.sleep(0.01)
    assert up.close(20)
    assert [int(name.split("-")[1]) for name in remote.names()] == [16, 12]
    folder = remote.get(remote.names()[0], tmp_path / "elsewhere")
    assert verify(folder) is None
    gone = CheckpointStorage(storage_path="s3://no-such-bucket/runs", region=REGION, s3=bucket)
    with pytest.raises(InputError, match=r"checkpoints.storage_path \(s3://no-such-bucket/runs\) cannot be written"):
        check_storage(gone, RUN)


@pytest.mark.row("C6")
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        check_storage(CheckpointStorage(storage_path=str(tmp_path / "file")), RUN)
    with pytest.raises(InputError, match="must be a folder or s3://"):
        check_storage(CheckpointStorage(storage_path="gs://bucket"), RUN)
    nobody = {"endpoint": f"http://127.0.0.1:{free_port()}", "tries": 1, "connect_seconds": 0.5}
    with pytest.raises(InputError, match="cannot be written"):
        check_storage(CheckpointStorage(storage_path="s3://lab", region=REGION, s3=nobody), RUN)
