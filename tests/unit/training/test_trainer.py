"""What the driver does with what its workers come back with; Ray is played."""

from __future__ import annotations

import inspect
import signal
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace

import pytest
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from pipeline.config.resources import ResourcesConfig
from pipeline.config.train import VaeTrainConfig
from pipeline.training import preemption, trainer
from pipeline.training.resilience import reservation
from scldm.errors import InputError

GOING = PreemptionInfo(deadline_ms=1_000, preempted_node_to_ranks={"n1": [0]})


@pytest.fixture
def play(tmp_path, monkeypatch):
    """`fit` where attempt after attempt ends as given: with facts, or with an error."""
    waited: list[PreemptionInfo] = []
    monkeypatch.setattr(trainer, "wait_until_gone", waited.append)
    monkeypatch.setattr(trainer, "newest_step", lambda folder: 7)

    def fit(ends: list, *, asked: bool = False):
        left = iter(ends)

        def attempt() -> SimpleNamespace:
            end = next(left)
            if isinstance(end, Exception):
                raise end
            return SimpleNamespace(error=None, return_value=end)

        @contextmanager
        def told(file):
            yield lambda: asked

        monkeypatch.setattr(trainer, "_trainer", lambda *a: SimpleNamespace(fit=attempt))
        monkeypatch.setattr(trainer, "stop_on_sigterm", told)
        spec = {"folder": str(tmp_path), "storage": {}, "run_name": "r"}
        return trainer.fit(spec, VaeTrainConfig(), ResourcesConfig(), "train_vae"), waited, list(left)

    return fit


def test_a_node_taken_away_is_waited_for_and_the_run_goes_on(play, capsys):
    facts, waited, left = play([PreemptionError(GOING), {"steps": 9}])
    assert (facts, left) == ({"steps": 9}, [])
    assert waited == [GOING]
    assert "a node is taken away; step 7 is safe" in capsys.readouterr().out


def test_workers_that_stopped_before_ray_knew_why_start_again(play, capsys):
    facts, waited, _ = play([{trainer.STOPPED: 5}, {"steps": 9}])
    assert facts == {"steps": 9}
    assert waited == []
    assert "step 5 is safe" in capsys.readouterr().out


@pytest.mark.parametrize("end", [{trainer.STOPPED: 7}, PreemptionError(GOING)])
def test_who_was_asked_to_stop_stops_also_where_a_node_goes_at_that_moment(play, end, capsys):
    with pytest.raises(SystemExit) as ended:
        play([end, {"steps": 9}], asked=True)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "goes on after step 7" in capsys.readouterr().out


def test_what_the_user_must_mend_is_an_input_error_and_no_failure_to_be_tried_again(play):
    """Three starts of the workers cost minutes and end the same."""
    with pytest.raises(InputError, match="step-8 is damaged"):
        play([{trainer.REFUSED: "step-8 is damaged"}, {"steps": 9}])


def test_another_error_is_the_callers(play):
    with pytest.raises(ValueError, match="broken"):
        play([ValueError("broken"), {"steps": 9}])


def test_who_only_lost_a_peer_is_not_named_beside_the_one_that_died():
    lost, died = RuntimeError("gloo: Connection closed by peer [127.0.0.1]:1"), RuntimeError("the actor is dead")
    assert trainer.culprits({0: lost, 1: died, 2: lost}) == [1]
    assert trainer.culprits({1: lost, 0: lost}) == [0, 1]
    assert trainer.culprits({}) == []


@pytest.mark.row("T4")
def test_T4_who_failed_how_often_and_what_is_safe_is_said_at_the_end(play, capsys):
    with pytest.raises(WorkerGroupError):
        play([WorkerGroupError("gone", {1: RuntimeError("killed")})])
    said = capsys.readouterr().out
    assert "train_vae: workers failed 4 times and train.max_failures is 3; the last time worker 1." in said
    assert "Step 7 is in a checkpoint" in said


@pytest.mark.parametrize(
    ("deadline", "alive_until", "ends"),
    [
        (1_020.0, 1_025.0, 1_025.0),  # a little late
        (1_020.0, 9_999.0, 1_050.0),  # it does not go at all
        (None, 9_999.0, 1_090.0),
        (5_000.0, 9_999.0, 1_090.0),  # the workers ended for another reason: nobody waits an hour
    ],
)
def test_a_node_is_waited_for_but_not_for_ever(monkeypatch, deadline, alive_until, ends):
    now = 1_000.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(preemption, "time", SimpleNamespace(time=lambda: now, sleep=sleep))
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": "n1", "Alive": now < alive_until}])
    ms = None if deadline is None else int(deadline * 1000)
    preemption.wait_until_gone(PreemptionInfo(deadline_ms=ms, preempted_node_to_ranks={"n1": [0]}))
    assert now == pytest.approx(ends, abs=1)


def test_rays_private_names_that_a_killed_drivers_nodes_are_found_by_have_not_moved():
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
    from ray.train.v2._internal.execution import context
    from ray.train.v2._internal.execution.scaling_policy import scaling_policy

    assert "run_id" in {f.name for f in fields(context.TrainRunContext)}
    assert 'f"train-{train_run_context.run_id}"' in inspect.getsource(scaling_policy)
    made = inspect.getsource(coordinator.get_or_create_autoscaling_coordinator)
    assert f'name="{reservation.ACTOR}"' in made
    assert f'namespace="{reservation.ACTOR}"' in made
    asked = list(inspect.signature(coordinator._AutoscalingCoordinatorActor.cancel_request).parameters)
    assert asked[:2] == ["self", "requester_id"]  # where Ray has started in this process it adds one of its own
