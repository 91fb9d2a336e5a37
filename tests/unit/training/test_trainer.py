"""How the driver reacts to the ends of its workers; Ray is replaced."""

from __future__ import annotations

import logging
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from pipeline.config.job import TrainVaeConfig
from pipeline.config.resources import ResourcesConfig
from pipeline.config.train import VaeTrainConfig
from pipeline.core.manifest import Manifest
from pipeline.training import preemption, trainer
from pipeline.training.tasks.spec import VaeWorkerSpec
from scldm.errors import InputError

GOING = PreemptionInfo(deadline_ms=1_000, preempted_node_to_ranks={"n1": [0]})


def spec(folder) -> VaeWorkerSpec:
    ingested = Manifest("ingest", "v", str(folder), {}, {}, {}, 0.0, 0.0)
    return VaeWorkerSpec(
        config=TrainVaeConfig(), inputs={"ingest": ingested}, folder=folder, version="v", seed=0, feed_engine="ray",
        tracker={}, run_name="r",
    )  # fmt: skip


@pytest.fixture
def play(tmp_path, monkeypatch, caplog):
    """Run `fit` with attempts that end as given: with facts, or with an error."""
    caplog.set_level(logging.INFO)
    waited: list[PreemptionInfo] = []
    monkeypatch.setattr(trainer, "wait_until_gone", waited.append)
    monkeypatch.setattr(trainer, "newest_step", lambda folder: 7)

    def fit(ends: list, *, stop_requested: bool = False):
        left = iter(ends)

        def attempt() -> SimpleNamespace:
            end = next(left)
            if isinstance(end, Exception):
                raise end
            return SimpleNamespace(error=None, return_value=end)

        @contextmanager
        def signalled(file):
            yield lambda: stop_requested

        monkeypatch.setattr(trainer, "_trainer", lambda *a: SimpleNamespace(fit=attempt))
        monkeypatch.setattr(trainer, "stop_on_sigterm", signalled)
        return trainer.fit(spec(tmp_path), VaeTrainConfig(), ResourcesConfig(), "train_vae"), waited, list(left)

    return fit


def test_a_preempted_node_is_waited_for_and_the_run_resumes(play, caplog):
    facts, waited, left = play([PreemptionError(GOING), {"steps": 9}])
    assert (facts, left) == ({"steps": 9}, [])
    assert waited == [GOING]
    assert "a node is taken away; step 7 is in a checkpoint" in caplog.text


def test_workers_that_stopped_before_ray_knew_the_reason_restart(play, caplog):
    facts, waited, _ = play([{trainer.STOPPED: 5}, {"steps": 9}])
    assert facts == {"steps": 9}
    assert waited == []
    assert "step 5 is in a checkpoint" in caplog.text


@pytest.mark.parametrize("end", [{trainer.STOPPED: 7}, PreemptionError(GOING)])
def test_a_requested_stop_wins_over_a_preemption_at_the_same_moment(play, end, caplog):
    with pytest.raises(SystemExit) as ended:
        play([end, {"steps": 9}], stop_requested=True)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "resumes after step 7" in caplog.text


def test_what_the_user_must_fix_is_an_input_error_and_is_not_retried(play):
    """Three restarts of the workers would cost minutes and end the same."""
    with pytest.raises(InputError, match="step-8 is damaged"):
        play([{trainer.REFUSED: "step-8 is damaged"}, {"steps": 9}])


def test_any_other_error_is_raised(play):
    with pytest.raises(ValueError, match="broken"):
        play([ValueError("broken"), {"steps": 9}])


def test_a_worker_that_only_lost_a_peer_is_not_named():
    lost, died = RuntimeError("gloo: Connection closed by peer [127.0.0.1]:1"), RuntimeError("the actor is dead")
    assert trainer.failed_workers({0: lost, 1: died, 2: lost}) == [1]
    assert trainer.failed_workers({1: lost, 0: lost}) == [0, 1]
    assert trainer.failed_workers({}) == []


@pytest.mark.row("T4")
def test_T4_the_last_message_names_the_failed_worker_the_count_and_the_step_in_a_checkpoint(play, caplog):
    with pytest.raises(WorkerGroupError):
        play([WorkerGroupError("gone", {1: RuntimeError("killed")})])
    assert "train_vae: workers failed 4 times and train.max_failures is 3; the last time worker 1." in caplog.text
    assert "Step 7 is in a checkpoint" in caplog.text


@pytest.mark.parametrize(
    ("deadline", "alive_until", "ends"),
    [
        (1_020.0, 1_025.0, 1_025.0),  # a little late
        (1_020.0, 9_999.0, 1_050.0),  # it does not go at all
        (None, 9_999.0, 1_090.0),
        (5_000.0, 9_999.0, 1_090.0),  # the workers ended for another reason: nobody waits an hour
    ],
)
def test_a_preempted_node_is_waited_for_only_for_a_limited_time(monkeypatch, deadline, alive_until, ends):
    now = 1_000.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(preemption, "time", SimpleNamespace(time=lambda: now, sleep=sleep))
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": "n1", "Alive": now < alive_until}])
    ms = None if deadline is None else int(deadline * 1000)
    preemption.wait_until_gone(PreemptionInfo(deadline_ms=ms, preempted_node_to_ranks={"n1": [0]}))
    assert now == pytest.approx(ends, abs=1)
