"""Checkpoints are uploaded to remote storage in the background, and found there again."""

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


def uploader(here: Path, remote: Remote) -> Uploader:
    return Uploader(here, remote, (2, 1), tries=3, first_wait=0.01)


def test_a_checkpoint_arrives_complete_and_old_ones_are_removed_except_the_best(tmp_path):
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
def test_queueing_does_not_wait_and_a_newer_checkpoint_replaces_one_that_waits(tmp_path, caplog):
    here, remote = tmp_path / "here", Slow(tmp_path / "there")
    up = uploader(here, remote)
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
    assert f"{left_out.name} is left out" in caplog.messages[0]


def test_an_upload_is_tried_again(tmp_path, caplog):
    up = uploader(tmp_path / "here", Slow(tmp_path / "there", faults=2))
    up.put(commit(tmp_path / "here", 4))
    assert up.close(10)
    assert steps(tmp_path / "there" / RUN) == [4]
    assert [line.split(":")[2].strip() for line in caplog.messages] == ["try 1 of 3", "try 2 of 3"]


def test_a_failed_upload_is_an_error_in_the_log_and_recorded_until_a_later_one_arrives(tmp_path, caplog):
    here = tmp_path / "here"
    up = uploader(here, Slow(tmp_path / "there", faults=3))
    first = commit(here, 4)
    up.put(first)
    assert not up.close(10)
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1
    assert errors[0].startswith(f"CHECKPOINT UPLOAD FAILED: {first.name}")
    again = uploader(here, Slow(tmp_path / "there"))
    assert again.pending() == [first.name]
    again.put(commit(here, 8))
    assert again.close(10)
    assert again.pending() == []


def test_the_end_waits_for_the_last_upload_for_a_limited_time(tmp_path, caplog):
    here, remote = tmp_path / "here", Slow(tmp_path / "there")
    remote.gate.clear()
    up = uploader(here, remote)
    up.put(commit(here, 4))
    began = time.monotonic()
    assert not up.close(0.2)
    assert time.monotonic() - began < 5
    assert "not done after 0 s" in caplog.messages[-1]
    remote.gate.set()


@pytest.mark.row("C1")
def test_an_incomplete_upload_is_not_a_checkpoint(tmp_path):
    """The manifest is uploaded last, so a killed upload leaves nothing that would be selected."""
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


def test_what_a_kill_left_in_remote_storage_is_removed_with_the_next_upload(tmp_path):
    """An incomplete upload, an incomplete removal, and one whose local folder is being removed."""
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


def test_what_a_kill_left_after_the_last_upload_is_removed_without_another(tmp_path, caplog):
    here, there = tmp_path / "here", tmp_path / "there" / RUN
    remote = Slow(tmp_path / "there")
    for step, loss in ((4, 1.0), (8, 3.0), (12, 2.0), (16, 4.0)):
        remote.put(commit(here, step, loss=loss))
    remote.gate.clear()  # no copy is made
    up = uploader(here, remote)
    up.clear(newest(here)[0].folder)
    assert up.close(10)
    assert steps(there) == [4, 12, 16]
    assert (caplog.messages, up.seconds) == ([], [])


@pytest.fixture
def bucket(monkeypatch):
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with moto_server() as address:
        client = boto3.client("s3", endpoint_url=address, region_name=REGION)
        client.create_bucket(Bucket="lab", CreateBucketConfiguration={"LocationConstraint": REGION})
        yield {"endpoint": address, "addressing": "path", "tries": 2}


def test_s3_stores_checkpoints_like_a_folder(tmp_path, bucket):
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
def test_storage_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        check_storage(CheckpointStorage(storage_path=str(tmp_path / "file")), RUN)
    with pytest.raises(InputError, match="must be a folder or s3://"):
        check_storage(CheckpointStorage(storage_path="gs://bucket"), RUN)
    nobody = {"endpoint": f"http://127.0.0.1:{free_port()}", "tries": 1, "connect_seconds": 0.5}
    with pytest.raises(InputError, match="cannot be written"):
        check_storage(CheckpointStorage(storage_path="s3://lab", region=REGION, s3=nobody), RUN)
