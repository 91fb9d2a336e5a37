"""The policies of a training run, in one list: a policy is added here, and the loop stays as it is."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pipeline.config.train import TrainConfig
from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.callbacks.checkpoint_schedule import CheckpointSchedule
from pipeline.training.callbacks.early_stopping import EarlyStopping
from pipeline.training.callbacks.metrics_log import MeanLoss, MetricsLog
from pipeline.training.callbacks.step_guard import StepGuard
from pipeline.training.callbacks.step_timer import StepTimer
from pipeline.training.callbacks.stop_signal import StopSignal
from pipeline.training.callbacks.stragglers import StragglerMonitor
from pipeline.training.callbacks.watchdog import Watchdog
from pipeline.training.checkpoints.manager import CheckpointManager
from pipeline.training.engine.deepspeed import Engine
from pipeline.training.state import Run
from pipeline.training.throughput import mfu, peak_flops

STOP_MARGIN = 8.0  # seconds before a node goes, and three times what a checkpoint took so far


def default_callbacks(
    config: TrainConfig, run: Run, engine: Engine, checkpoints: CheckpointManager, timer: StepTimer
) -> list[TrainingCallback]:
    """Build the callbacks of a run. Collective.

    The order matters where one reads what another has set in the same hook: the loss and the timer's means come before
    the stragglers, which compare with them; early stopping comes before the metrics log, which writes the last step.
    """
    rank = dist.get_rank()
    callbacks: list[TrainingCallback] = [
        Watchdog(run.folder, rank=rank, timeout_s=config.step_timeout_s),
        MeanLoss(),
        timer,
        StepGuard(config),
        EarlyStopping(config),
    ]
    if rank == 0:
        callbacks.append(_metrics_log(config, run, engine))
    return [
        *callbacks,
        StopSignal(run.folder, run.preempted, margin=lambda: STOP_MARGIN + 3 * checkpoints.longest),
        CheckpointSchedule(config, run.on_checkpoint),
        StragglerMonitor(engine.device),
    ]


def _metrics_log(config: TrainConfig, run: Run, engine: Engine) -> MetricsLog:
    name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else None
    peak, workers = peak_flops(name, config.precision), dist.get_world_size()

    def utilisation(cells_per_s: float) -> float | None:
        return None if run.flops_per_cell is None else mfu(run.flops_per_cell, cells_per_s, peak, workers)

    return MetricsLog(
        run.folder, run.tracker, config, batch_size=config.feed.batch_size, grad_norm=lambda: engine.grad_norm,
        mfu=utilisation,
    )  # fmt: skip
