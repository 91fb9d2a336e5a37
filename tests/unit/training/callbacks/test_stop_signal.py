"""Notices: SIGTERM to the driver becomes a file that the workers look for; a node that goes is used until it goes."""

from __future__ import annotations

import os
import signal

import pytest
import torch.distributed as dist

from pipeline.training.callbacks.stop_signal import AT_ONCE, Notice, StopNotice
from pipeline.training.trainer import stop_on_sigterm


def test_the_first_sigterm_asks_the_workers_and_the_second_ends_the_driver(tmp_path):
    file = tmp_path / "stop.request"
    file.write_text("of the run before")
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm(file) as asked:
        assert not asked()
        assert not file.exists(), "an old request must not stop a new run"
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        assert file.exists()
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert not file.exists()


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def notices(tmp_path, goes_at: list[float | None], times: list[float]) -> list[Notice]:
    """What each step is told, where the cluster answers `goes_at` and the clock says `times`, step after step."""
    answers, clock = iter(goes_at), iter(times)
    notice = StopNotice(
        tmp_path, lambda: next(answers), margin=lambda: 10.0, every_seconds=0.0, clock=lambda: next(clock)
    )
    said = []
    for _ in goes_at:
        notice.ask()
        said.append(notice.answer())
        if said[-1] is Notice.STOP:
            break
    return said


@pytest.mark.row("T5")
@pytest.mark.usefixtures("alone")
def test_a_node_that_goes_costs_a_checkpoint_at_once_and_is_used_until_shortly_before(tmp_path):
    said = notices(tmp_path, [None, 100.0, 100.0, 100.0, 100.0], [60.0, 89.0, 90.5])
    assert said == [Notice.NONE, Notice.SAVE, Notice.NONE, Notice.NONE, Notice.STOP]


@pytest.mark.usefixtures("alone")
def test_a_second_node_that_goes_sooner_is_heeded(tmp_path):
    said = notices(tmp_path, [100.0, 100.0, 70.0, 70.0], [55.0, 58.0, 62.0])
    assert said == [Notice.SAVE, Notice.NONE, Notice.NONE, Notice.STOP]


@pytest.mark.usefixtures("alone")
def test_a_node_that_goes_nobody_knows_when_ends_the_run_at_the_next_step(tmp_path):
    assert notices(tmp_path, [AT_ONCE, AT_ONCE], [50.0]) == [Notice.SAVE, Notice.STOP]


@pytest.mark.usefixtures("alone")
def test_a_drain_that_was_called_off_is_forgotten(tmp_path):
    assert notices(tmp_path, [100.0, None, None], [60.0]) == [Notice.SAVE, Notice.NONE, Notice.NONE]
