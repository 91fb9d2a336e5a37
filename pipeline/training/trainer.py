"""Training on Ray, seen from the driver: start the workers, restart them after failures, and show progress."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cluster.child import in_child
from pipeline.config.checks import feed_problems, gpu_problems
from pipeline.config.job import ResourcesConfig, TrainConfig
from pipeline.core.logs import STOPPED as STOPPED_MESSAGE
from pipeline.core.progress import ProgressReader
from pipeline.training.callbacks.stop_signal import STOP_FILE
from pipeline.training.callbacks.watchdog import FIRST
from pipeline.training.checkpoints.manifest import newest_step
from pipeline.training.checkpoints.remote import check_storage
from pipeline.training.preemption import preemption_time, wait_until_gone
from pipeline.training.state import Stopped, TrainingStopped
from pipeline.training.tasks.spec import AnyWorkerSpec
from scldm.errors import InputError

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.preemption import PreemptionInfo

# Keys of what a worker returns instead of facts.
REFUSED = "refused"  # the user must fix it; no restart can
HOPELESS = "hopeless"  # a restart would end the same way, so it is not a failure that Ray may retry
STOPPED = "stopped_at"  # a stop signal ended the workers
LOST_PEER = ("closed by peer", "reset by peer", "remote process exited")  # parts of gloo's and NCCL's messages
log = logging.getLogger(__name__)


def _run_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Run in every Ray Train worker."""
    import ray.train

    return _outcome(config["spec"], on_checkpoint=lambda metrics: ray.train.report(metrics), preempted=preemption_time)


def _run_alone(spec: AnyWorkerSpec, workers: int) -> Iterator[dict[str, Any]]:
    """Run in the child process of a job without Ray: as its worker, or as the parent of several."""
    port = 0
    if workers > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="scldm-workers-") as folder:
        outcome = Path(folder) / "outcome.json"
        if workers == 1:
            _run_rank(0, spec, workers, port, outcome)
        else:
            from torch.multiprocessing import spawn

            spawn(_run_rank, (spec, workers, port, outcome), nprocs=workers)  # ends the others if one fails
        yield json.loads(outcome.read_text())


def _run_rank(rank: int, spec: AnyWorkerSpec, workers: int, port: int, outcome: Path) -> None:
    """Run a worker of a job without Ray; rank 0 writes what became of the training."""
    from pipeline.training.worker import start_process_group

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    start_process_group()
    found = _outcome(spec)
    if rank == 0:
        outcome.write_text(json.dumps(found))


def _outcome(spec: AnyWorkerSpec, **hooks: Any) -> dict[str, Any]:
    """Train; return the facts, or what ended the worker. Imports the worker here: the driver does not load it."""
    from pipeline.training.checkpoints.selection import CannotResume
    from pipeline.training.worker import train_worker

    try:
        return train_worker(spec, **hooks)
    except Stopped as stopped:
        return {STOPPED: stopped.step}
    except TrainingStopped as stopped:
        return {HOPELESS: str(stopped)}
    except CannotResume as error:
        return {REFUSED: str(error)}


def fit(spec: AnyWorkerSpec, train: TrainConfig, resources: ResourcesConfig, stage: str) -> dict[str, Any]:
    """Run `train_worker` on `resources.workers` workers until training is done, and return the facts of the stage.

    The workers are Ray Train's; without Ray (`resources.ray`) they are child processes.

    If a worker dies, the whole group restarts and resumes from the newest checkpoint that verifies, at most
    `train.max_failures` times. If a node is about to be taken away, the workers write checkpoints, end, and start again
    without it; that is not a failure. What Ray itself stores of a run is not needed to resume.

    Raises:
        InputError: if the settings do not fit, or a checkpoint must not be resumed from.
        TrainingStopped: if a restart would end the same way.
        SystemExit: after SIGTERM, with all work in a checkpoint.
    """
    if problems := [*gpu_problems([stage], resources), *feed_problems(train, resources)]:
        raise InputError("\n".join(problems))
    check_storage(spec.storage, spec.run_name)
    with (
        ProgressReader(spec.folder, stage, train.log_every_seconds),
        stop_on_sigterm(spec.folder / STOP_FILE) as stop_requested,
    ):
        while True:
            attempt = _attempt if resources.ray else _attempt_alone
            facts, preempted = attempt(spec, train, resources, stage)
            if REFUSED in facts:
                raise InputError(facts[REFUSED])
            if HOPELESS in facts:
                raise TrainingStopped(facts[HOPELESS])
            if STOPPED not in facts:
                return facts
            if stop_requested():
                log.info(f"{STOPPED_MESSAGE}; the same command resumes after step {facts[STOPPED]}")
                raise SystemExit(128 + signal.SIGTERM)
            why = "a node is taken away" if resources.ray else "a worker was stopped"
            log.info(f"{why}; step {facts[STOPPED]} is in a checkpoint, resuming without it")
            if preempted is not None:
                wait_until_gone(preempted)


def _attempt(
    spec: AnyWorkerSpec, train: TrainConfig, resources: ResourcesConfig, stage: str
) -> tuple[dict[str, Any], PreemptionInfo | None]:
    """Run the workers once.

    Returns:
        What rank 0 returned; if a node was taken away, the newest step and Ray's information about the nodes.
    """
    from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError

    try:
        result = _trainer(spec, train, resources, stage).fit()
        if result.error is not None:
            raise result.error
        return result.return_value, None
    except PreemptionError as error:
        return {STOPPED: newest_step(spec.folder)}, error.preemption_info
    except WorkerGroupError as error:
        workers = ", ".join(map(str, failed_workers(error.worker_failures))) or "of unknown rank"
        log.error(
            f"{stage}: workers failed {train.max_failures + 1} times and train.max_failures is {train.max_failures}; "
            f"the last time worker {workers}. Step {newest_step(spec.folder)} is in a checkpoint, and the same command "
            "resumes from there"
        )
        raise


def _attempt_alone(
    spec: AnyWorkerSpec, train: TrainConfig, resources: ResourcesConfig, stage: str
) -> tuple[dict[str, Any], None]:
    """Run the workers of a job without Ray; after a failure again, from the newest checkpoint, as Ray Train does."""
    for failures in range(1, train.max_failures + 2):
        try:
            workers = resources.workers.max
            (facts,) = in_child(_run_alone, spec, workers, resources=resources, folder=spec.folder)
            return facts, None
        except InputError:
            raise
        except Exception as error:
            log.error(
                f"{stage}: a worker failed {failures} times and train.max_failures is {train.max_failures}; step "
                f"{newest_step(spec.folder)} is in a checkpoint ({type(error).__name__}: {str(error).splitlines()[0]})"
            )
            if failures > train.max_failures:
                raise
    raise AssertionError("the last failure is raised")


def failed_workers(failures: Mapping[int, Exception]) -> list[int]:
    """Return the ranks that failed on their own; all of them if each only reports that it lost a peer."""
    own = [rank for rank, error in failures.items() if not any(part in str(error) for part in LOST_PEER)]
    return sorted(own or failures)


def _trainer(spec: AnyWorkerSpec, train: TrainConfig, resources: ResourcesConfig, stage: str) -> TorchTrainer:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = resources.gpus_per_worker > 0
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if gpu:
        per_worker["GPU"] = resources.gpus_per_worker
    least, most = resources.workers.min, resources.workers.max
    return TorchTrainer(
        _run_worker,
        train_loop_config={"spec": spec},
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most), use_gpu=gpu, resources_per_worker=per_worker
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=collective_timeout(train)),
        run_config=RunConfig(
            name=f"{stage}-{spec.version}-{uuid.uuid4().hex[:6]}",
            storage_path=str(spec.folder / "ray"),
            # A preempted node ends this fit, and `fit` above begins another: Ray would count that node among those to
            # start workers on, and time out on it again and again.
            failure_config=FailureConfig(max_failures=train.max_failures, max_preemption_failures=0),
        ),
    )


def collective_timeout(train: TrainConfig) -> int:
    """Return the time-out of a collective in seconds: later than the watchdog, which reports more."""
    return math.ceil(FIRST * train.step_timeout_s) + 60


@contextmanager
def stop_on_sigterm(file: Path) -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM to the driver (`ray job stop`, a pod that ends) into a request to the workers, through `file`.

    Yields a function that returns whether the signal came. A second SIGTERM ends the driver immediately. Only a main
    thread can take signals.
    """
    file.unlink(missing_ok=True)  # left by an earlier run
    came = False

    def request_stop(number: int, frame: Any) -> None:
        nonlocal came
        if came:
            raise SystemExit(128 + signal.SIGTERM)
        came = True
        file.write_text("the driver was asked to stop\n")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, request_stop)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)
        file.unlink(missing_ok=True)
