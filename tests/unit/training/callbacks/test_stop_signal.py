"""Stop signals: SIGTERM to the driver becomes a file that the workers check; a preempted node is used until it goes."""

from __future__ import annotations

import os
import signal

import pytest
import torch.distributed as dist

from pipeline.training.callbacks.stop_signal import UNKNOWN_TIME, StopRequest, StopSignal
from pipeline.training.trainer import stop_on_sigterm


def test_the_first_sigterm_stops_the_workers_and_the_second_ends_the_driver(tmp_path):
    file = tmp_path / "stop.request"
    file.write_text("left by an earlier run")
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm(file) as requested:
        assert not requested()
        assert not file.exists(), "an old request must not stop a new run"
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested()
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


def requests(tmp_path, goes_at: list[float | None], times: list[float]) -> list[StopRequest]:
    """Return the request of each step, given the cluster's answers and the clock, step after step."""
    answers, clock = iter(goes_at), iter(times)
    signals = StopSignal(
        tmp_path, lambda: next(answers), margin=lambda: 10.0, every_seconds=0.0, clock=lambda: next(clock)
    )
    found = []
    for _ in goes_at:
        signals.begin_check()
        found.append(signals.finish_check())
        if found[-1] is StopRequest.STOP:
            break
    return found


@pytest.mark.row("T5")
@pytest.mark.usefixtures("alone")
def test_a_preempted_node_costs_a_checkpoint_immediately_and_is_used_until_shortly_before(tmp_path):
    found = requests(tmp_path, [None, 100.0, 100.0, 100.0, 100.0], [60.0, 89.0, 90.5])
    assert found == [StopRequest.NONE, StopRequest.SAVE, StopRequest.NONE, StopRequest.NONE, StopRequest.STOP]


@pytest.mark.usefixtures("alone")
def test_an_earlier_deadline_of_a_second_node_counts(tmp_path):
    found = requests(tmp_path, [100.0, 100.0, 70.0, 70.0], [55.0, 58.0, 62.0])
    assert found == [StopRequest.SAVE, StopRequest.NONE, StopRequest.NONE, StopRequest.STOP]


@pytest.mark.usefixtures("alone")
def test_a_node_that_goes_at_an_unknown_time_ends_the_run_at_the_next_step(tmp_path):
    assert requests(tmp_path, [UNKNOWN_TIME, UNKNOWN_TIME], [50.0]) == [StopRequest.SAVE, StopRequest.STOP]


@pytest.mark.usefixtures("alone")
def test_a_cancelled_drain_is_forgotten(tmp_path):
    assert requests(tmp_path, [100.0, None, None], [60.0]) == [StopRequest.SAVE, StopRequest.NONE, StopRequest.NONE]
