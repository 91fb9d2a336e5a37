"""The entry point of a training worker, under Ray Train or under torchrun.

torchrun --nproc_per_node 2 -m pipeline.training.worker SPEC.json
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from pipeline.core.faults import arm
from pipeline.core.logs import setup_logging
from pipeline.tracking.tracker import attach_tracker
from pipeline.training.callbacks.stop_signal import STOP_FILE
from pipeline.training.checkpoints.remote import Remote
from pipeline.training.checkpoints.selection import CannotResume
from pipeline.training.state import Run, Stopped, TrainingStopped
from pipeline.training.tasks.distil import distil_flow
from pipeline.training.tasks.flow import train_flow
from pipeline.training.tasks.spec import AnyWorkerSpec, DistilWorkerSpec, VaeWorkerSpec, read_spec
from pipeline.training.tasks.vae import train_vae
from scldm.errors import InputError

STOPPED_EXIT = 75  # EX_TEMPFAIL: nothing is wrong, run again
log = logging.getLogger("pipeline.training.worker")  # under torchrun this module's name is __main__


def train_worker(
    spec: AnyWorkerSpec,
    on_checkpoint: Callable[[dict[str, float]], None] | None = None,
    preempted: Callable[[], float | None] | None = None,
) -> dict[str, Any]:
    """Train and export a model. Collective; the process group must be initialized.

    Args:
        on_checkpoint: Called with step and metrics after every checkpoint.
        preempted: When a node of the run is taken away; see `StopSignal`.

    Returns:
        The facts of the stage.

    Raises:
        Stopped: after a stop signal, with all work in a checkpoint.
    """
    rank = dist.get_rank()
    setup_logging(stage=_stage(spec), rank=rank)
    arm(spec.fault)
    torch.set_num_threads(spec.threads)
    tracker = attach_tracker(spec.tracker if rank == 0 else {})
    tracker.tag("scldm.world_size", dist.get_world_size())
    has_remote = spec.storage.storage_path is not None and rank == 0
    run = Run(
        spec.folder, spec.version, spec.feed_engine, tracker, on_checkpoint or (lambda metrics: None),
        remote=Remote(spec.storage, spec.run_name) if has_remote else None, storage=spec.storage, preempted=preempted,
    )  # fmt: skip
    try:
        if isinstance(spec, DistilWorkerSpec):
            return distil_flow(spec, run)
        return train_vae(spec, run) if isinstance(spec, VaeWorkerSpec) else train_flow(spec, run)
    finally:
        tracker.close()


def _stage(spec: AnyWorkerSpec) -> str:
    return spec.kind if isinstance(spec, DistilWorkerSpec) else f"train_{spec.kind}"


def main() -> None:
    """Run under torchrun: print the facts on rank 0, or exit with a code that tells what ended the run."""
    spec = read_spec(Path(sys.argv[1]))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    setup_logging(stage=_stage(spec), rank=int(os.environ["RANK"]))
    try:
        arm()
    except ValueError as error:
        log.error(str(error))
        sys.exit(2)
    try:
        start_process_group()
    except InputError as error:
        log.error(str(error))
        sys.exit(2)
    if dist.get_rank() == 0:
        (spec.folder / STOP_FILE).unlink(missing_ok=True)  # left by an earlier run
    dist.barrier()
    try:
        facts = train_worker(spec)
    except Stopped as stopped:
        _exit(STOPPED_EXIT, stopped, logging.INFO)
    except CannotResume as error:
        _exit(2, error, logging.ERROR)
    except TrainingStopped as stopped:
        _exit(1, stopped, logging.ERROR)
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps(facts) + "\n")  # the result, for whoever started the workers
        sys.stdout.flush()
    dist.destroy_process_group()


def start_process_group() -> None:
    """Take this worker's GPU, if the machine has any, and join the workers that torchrun started.

    The GPU is set and named before the first collective: NCCL would otherwise guess it, and without `set_device` all
    workers of a machine would use its first one.

    Raises:
        InputError: torchrun started more workers than the machine has GPUs.
    """
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= gpus:
        raise InputError(
            f"torchrun: worker {local_rank} of this machine has no GPU, there are {gpus}; start it with "
            f"--nproc_per_node {gpus}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on CPUs"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)


def _exit(code: int, reason: Exception, level: int) -> NoReturn:
    """End this worker; rank 0 logs the reason for all."""
    if dist.get_rank() == 0:
        log.log(level, str(reason))
    sys.exit(code)


if __name__ == "__main__":
    main()
