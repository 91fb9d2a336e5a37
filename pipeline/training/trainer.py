"""Training on Ray: one TorchTrainer, workers that fail and come back, progress on the driver's terminal."""

from __future__ import annotations

import math
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config.checks import feed_problems
from pipeline.config.job import ResourcesConfig, TrainConfig
from pipeline.config.resources import CheckpointStorage
from pipeline.core.progress import ProgressReader
from pipeline.training.callbacks.stop_signal import STOP_FILE
from pipeline.training.callbacks.watchdog import FIRST
from pipeline.training.checkpoints.manifest import newest_step
from pipeline.training.checkpoints.remote import check_storage
from pipeline.training.preemption import node_goes_at, wait_until_gone
from pipeline.training.resilience.reservation import give_back, remember
from scldm.errors import InputError

REFUSED = "refused"  # in place of facts, where no start of the workers can mend what the user must
HOPELESS = "hopeless"  # in place of facts, where starting again would end the same: no failure that Ray may retry
PEER_WENT = ("closed by peer", "reset by peer", "remote process exited")  # what gloo and NCCL say
STOPPED = "stopped_at"  # in place of facts, where a notice ended the workers


def _on_worker(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs in every Ray Train worker; imports there, so that the driver stays light."""
    import ray.train

    from pipeline.training.callbacks.step_guard import TrainingStopped
    from pipeline.training.checkpoints.selection import CannotResume
    from pipeline.training.state import Stopped
    from pipeline.training.worker import train_worker

    if ray.train.get_context().get_world_rank() == 0:
        remember(Path(spec["folder"]))
    try:
        return train_worker(
            spec,
            on_checkpoint=lambda metrics: ray.train.report(metrics),
            preempted=node_goes_at,
        )
    except Stopped as stopped:
        return {STOPPED: stopped.step}
    except TrainingStopped as stopped:
        return {HOPELESS: str(stopped)}
    except CannotResume as error:
        return {REFUSED: str(error)}


def fit(spec: dict[str, Any], train: TrainConfig, resources: ResourcesConfig, stage: str) -> dict[str, Any]:
    """Run `train_worker` on `resources.workers` workers until it is done. Facts of the stage.

    A worker that dies takes the group with it; the group starts again and resumes from the newest checkpoint that
    verifies, at most `train.max_failures` times. Where a node gives notice, the workers write checkpoints, end, and
    start again without it; that is no failure. What Ray itself stores of a run is not needed to resume.
    """
    if problems := feed_problems(train, resources):
        raise InputError("\n".join(problems))
    check_storage(CheckpointStorage.model_validate(spec["storage"]), spec["run_name"])
    folder = Path(spec["folder"])
    give_back(folder)
    with ProgressReader(folder, stage, train.log_every_seconds), stop_on_sigterm(folder / STOP_FILE) as asked:
        while True:
            facts, taken = _attempt(spec, train, resources, stage)
            if REFUSED in facts:
                raise InputError(facts[REFUSED])
            if HOPELESS in facts:
                from pipeline.training.callbacks.step_guard import TrainingStopped

                raise TrainingStopped(facts[HOPELESS])
            if STOPPED not in facts:
                return facts
            if asked():
                print(f"stopped as asked; the same command goes on after step {facts[STOPPED]}", flush=True)
                raise SystemExit(128 + signal.SIGTERM)
            print(f"a node is taken away; step {facts[STOPPED]} is safe, going on without the node", flush=True)
            if taken is not None:
                wait_until_gone(taken)


def _attempt(
    spec: dict[str, Any], train: TrainConfig, resources: ResourcesConfig, stage: str
) -> tuple[dict[str, Any], Any]:
    """What rank 0 returned; of workers whose node was taken away, the newest step and Ray's word on the nodes."""
    from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError

    try:
        result = _trainer(spec, train, resources, stage).fit()
        if result.error is not None:
            raise result.error
        return result.return_value, None
    except PreemptionError as taken:
        return {STOPPED: newest_step(Path(spec["folder"]))}, taken.preemption_info
    except WorkerGroupError as failed:
        who = ", ".join(map(str, culprits(failed.worker_failures))) or "of unknown number"
        print(
            f"{stage}: workers failed {train.max_failures + 1} times and train.max_failures is {train.max_failures}; "
            f"the last time worker {who}. Step {newest_step(Path(spec['folder']))} is in a checkpoint, and the same "
            "command goes on from there",
            flush=True,
        )
        raise


def culprits(failures: Mapping[int, Exception]) -> list[int]:
    """Workers that failed of themselves; all, where each only says that another one went."""
    own = [rank for rank, error in failures.items() if not any(sign in str(error) for sign in PEER_WENT)]
    return sorted(own or failures)


def _trainer(spec: dict[str, Any], train: TrainConfig, resources: ResourcesConfig, stage: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = resources.gpus_per_worker > 0
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if gpu:
        per_worker["GPU"] = resources.gpus_per_worker
    least, most = resources.workers.min, resources.workers.max
    return TorchTrainer(
        _on_worker,
        train_loop_config=spec,
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most), use_gpu=gpu, resources_per_worker=per_worker
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=collective_timeout(train)),
        run_config=RunConfig(
            name=f"{stage}-{spec['version']}-{uuid.uuid4().hex[:6]}",
            storage_path=str(Path(spec["folder"]) / "ray"),
            # A node taken away ends this fit, and `fit` above begins another: Ray would count the node that goes among
            # those to start workers on, and time out on it again and again.
            failure_config=FailureConfig(max_failures=train.max_failures, max_preemption_failures=0),
        ),
    )


def collective_timeout(train: TrainConfig) -> int:
    """Seconds that a collective may wait. Later than the watchdog, which says more."""
    return math.ceil(FIRST * train.step_timeout_s) + 60


@contextmanager
def stop_on_sigterm(file: Path) -> Iterator[Callable[[], bool]]:
    """SIGTERM to the driver (`ray job stop`, a pod that ends) asks the workers for a checkpoint through `file`.

    Yields whether it came. A second SIGTERM ends the driver at once. Only a main thread can take signals.
    """
    file.unlink(missing_ok=True)  # it was for the run before
    came = False

    def ask(number: int, frame: Any) -> None:
        nonlocal came
        if came:
            raise SystemExit(128 + signal.SIGTERM)
        came = True
        file.write_text("the driver was asked to stop\n")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)
        file.unlink(missing_ok=True)
