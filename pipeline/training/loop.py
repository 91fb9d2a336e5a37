"""The training loop: the same for the VAE and for the flow, under Ray Train and under torchrun.

A step is one global batch. Its learning rate, its cells and its randomness are functions of (seed, step), so a run that
was killed and resumes from a checkpoint does what the uninterrupted run would have done. The loop computes steps,
validates and saves; when to save, stop, skip or report is decided by callbacks (`callbacks.defaults`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.job import TrainConfig
from pipeline.core.faults import fault_point
from pipeline.core.numbers import ceil_div
from pipeline.data.loading.blocks import BlockSource
from pipeline.data.loading.feed import feed
from pipeline.data.loading.order import FeedOrder
from pipeline.training.callbacks.base import TrainingCallback
from pipeline.training.callbacks.defaults import default_callbacks
from pipeline.training.callbacks.metrics_log import LOG_EVERY
from pipeline.training.callbacks.step_timer import StepTimer
from pipeline.training.checkpoints.manager import CheckpointManager
from pipeline.training.checkpoints.manifest import TrainingPosition
from pipeline.training.engine.compiled_blocks import compile_blocks
from pipeline.training.engine.deepspeed import Engine
from pipeline.training.objectives.base import Objective
from pipeline.training.out_of_memory import explain_out_of_memory
from pipeline.training.prefetch import PreparedStep, prefetch
from pipeline.training.state import Run, StepLosses, Stopped, TrainingState
from scldm.optim.adamw import adamw
from scldm.optim.config import EMAConfig
from scldm.optim.ema import EMA
from scldm.optim.schedule import learning_rate_factor

MAX_UPLOAD_WAIT_S = 20.0  # for uploads after a stop signal; the next start does the rest


@dataclass
class TrainingResult:
    """A finished run, with the weights that become the model.

    The caller exports the model from it, while the last checkpoints are still being uploaded, and then calls `close`.

    Attributes:
        engine: Holds the network, with the weights to export: the last or the best ones.
        ema: Their average; None if the run kept none.
        checkpoint: The checkpoint that holds the weights to export.
        metrics: The latest value of each metric; `val/loss` is that of the weights to export.
        callbacks: All callbacks of the run, with what they measured.
        steps: Steps done in all.
        exported_step: The step of the weights to export.
        checkpoints: Manages and uploads the checkpoints of the run.
    """

    engine: Engine
    ema: EMA | None
    checkpoint: Path
    metrics: dict[str, float]
    callbacks: Sequence[TrainingCallback]
    steps: int
    exported_step: int
    checkpoints: CheckpointManager

    def close(self) -> None:
        """Wait for uploads in progress, at most `checkpoints.wait_at_end` seconds. Not collective.

        A warning names the file that lists what was not uploaded by then.
        """
        self.checkpoints.close()


def micro_batching(config: TrainConfig, world_size: int) -> tuple[int, int]:
    """Return a worker's micro batch size, and its micro batches per step; the global batch is what the config says."""
    rows = config.feed.batch_size // world_size
    micro = min(config.feed.micro_batch_size, rows)
    return micro, ceil_div(rows, micro)


def run_training(
    objective: Objective,
    source: BlockSource,
    order: FeedOrder,
    config: TrainConfig,
    run: Run,
    *,
    ema_config: EMAConfig | None = None,
    callbacks: Sequence[TrainingCallback] = (),
    rates: Mapping[str, float | Tensor] | None = None,
) -> TrainingResult:
    """Train to max_steps, from the newest checkpoint that verifies or from the start. Collective.

    Args:
        callbacks: Policies besides the default ones; they run after them.
        rates: Learning rates of parameters relative to that of a step, see `Engine`.

    Raises:
        Stopped: after a stop signal; everything up to that step is in a checkpoint.
        TrainingStopped: if the settings end the run, for example at steps that are not finite.
        OutOfMemory: on the worker that ran out of memory, with the settings that reduce its use.
    """
    micro, _ = micro_batching(config, dist.get_world_size())
    with explain_out_of_memory(config, micro, "between its steps"):
        loop = TrainingLoop(objective, order, config, run, ema_config, callbacks, rates)
        loop.resume()
        loop.run_steps(source)
        fault_point("training.before_export")
        return loop.result()


class TrainingLoop:
    """A run in progress. All methods are collective."""

    def __init__(
        self,
        objective: Objective,
        order: FeedOrder,
        config: TrainConfig,
        run: Run,
        ema_config: EMAConfig | None,
        callbacks: Sequence[TrainingCallback] = (),
        rates: Mapping[str, float | Tensor] | None = None,
    ):
        self.objective, self.order, self.config, self.run = objective, order, config, run
        self.world_size = dist.get_world_size()
        self.micro, self.accumulation = micro_batching(config, self.world_size)
        optimizer = adamw(objective.module, config.optimizer)
        if config.compile:
            compile_blocks(objective.module)
        self.engine = Engine(
            objective.module, optimizer, config, micro_batch_size=self.micro, accumulation=self.accumulation,
            rates=rates,
        )  # fmt: skip
        with self.engine.whole_parameters():
            self.ema = None if ema_config is None else EMA(self.engine.module, ema_config)
        self.checkpoints = CheckpointManager(
            run.folder, self.engine, self.ema, self._position, keep_last=config.keep_last,
            keep_best=max(config.keep_best, int(config.export == "best")), remote=run.remote, storage=run.storage,
        )  # fmt: skip
        self.state, self.timer = TrainingState(config.max_steps), StepTimer()
        self.callbacks = [*default_callbacks(config, run, self.engine, self.checkpoints, self.timer), *callbacks]

    def resume(self) -> None:
        """Load the newest checkpoint that verifies, if there is one."""
        found = self.checkpoints.resume()
        self.state.step, self.state.rejected_checkpoints = found.step, found.rejected
        if found.folder is None:
            return
        self.state.resumed_from = found.step
        for callback in self.callbacks:
            key = callback.state_key
            if key is not None and key in found.more:  # a callback may be newer than the checkpoint
                callback.load_state_dict(found.more[key])

    def run_steps(self, source: BlockSource) -> None:
        """Take all steps that are left.

        Raises:
            Stopped: after a stop signal.
        """
        with ExitStack() as stack:
            for callback in self.callbacks:
                callback.on_train_start(self.state)
                stack.callback(callback.on_train_end, self.state)
            start = self.state.step
            stop = start if self.state.finish_requested else self.config.max_steps
            steps = feed(
                source, self.order, rank=dist.get_rank(), world_size=self.world_size, start_step=start, stop_step=stop,
                micro_batch_size=self.micro, engine=self.run.feed_engine,
            )  # fmt: skip
            prepared = stack.enter_context(closing(prefetch(steps, self.objective.prepare, self.engine.device)))
            for step in self.timer.measure_waits("data_wait", prepared):
                with explain_out_of_memory(self.config, self.micro, f"in step {step.step + 1}"):
                    self._take_step(step)
                if self.state.is_last:
                    break

    def result(self) -> TrainingResult:
        """Return the finished run with the weights that are to be exported: the last or the best ones."""
        assert self.checkpoints.latest is not None
        exported_step, metrics = self.state.step, self.state.metrics
        if self.config.export == "best":
            best = self.checkpoints.load_best()
            exported_step, metrics = best.position.step, metrics | {"val/loss": best.metrics["val/loss"]}
        return TrainingResult(
            self.engine, self.ema, self.checkpoints.latest, metrics, self.callbacks, steps=self.state.step,
            exported_step=exported_step, checkpoints=self.checkpoints,
        )  # fmt: skip

    def _take_step(self, step: PreparedStep) -> None:
        fault_point("training.before_step", step=step.step)
        for callback in self.callbacks:
            callback.on_step_start(self.state)
        factor = learning_rate_factor(step.step, self.config.max_steps, self.config.optimizer)
        self.state.begin_step(step.step + 1, self.config.optimizer.lr * factor)
        with self.timer.measure("step"):
            self._update(step)
        fault_point("training.after_step", step=step.step)
        if self.state.step % self.config.validate_every == 0 or self.state.is_last:
            self._validate()
        if self.state.step % LOG_EVERY == 0 or self.state.is_last:
            for callback in self.callbacks:
                self.state.metrics |= callback.collect_metrics(self.state)
        for callback in self.callbacks:
            callback.on_step_end(self.state)
        if self.state.checkpoint_requested or self.state.is_last or self.state.is_interrupted:
            self._save()
        if self.state.is_interrupted:
            self.checkpoints.close(max_wait=MAX_UPLOAD_WAIT_S)
            raise Stopped(self.state.step)

    def _update(self, step: PreparedStep) -> None:
        """Compute the gradients of a global batch and update the weights, unless a callback refuses.

        Raises:
            RuntimeError: if this worker's micro batches are not as many as the engine accumulates.
        """
        losses = StepLosses(self.engine.device, step.real_cells)
        micro_batches = list(step.micro_batches())
        if len(micro_batches) != self.accumulation:  # every share below and the engine's count would be wrong
            raise RuntimeError(
                f"step {step.step + 1} has {len(micro_batches)} micro batches and the engine accumulates "
                f"{self.accumulation}: the feed and micro_batching() cut its cells differently; please report this"
            )
        for i, (index, batch) in enumerate(micro_batches, start=1):
            loss = self.objective.loss(self.engine, batch, index)
            losses.add(loss, batch.weight, batch.joinids)
            if i == len(micro_batches) or self.config.zero_stage > 1:  # until then nothing is exchanged
                for callback in self.callbacks:
                    callback.on_gradient_exchange(self.state)
            # The engine divides by accumulation and world size; what remains is the mean over the batch's real cells.
            share = self.accumulation * self.world_size / step.real_cells
            self.engine.backward((loss * batch.weight).sum() * share)
            # DeepSpeed counts micro batches in step(), and by that count it knows in which backward pass and which
            # step() a global batch ends. After the last one the callbacks are asked first.
            if i < len(micro_batches):
                self.engine.step(self.state.lr)
        losses.reduce()
        fault_point("training.before_update", step=step.step)
        accepted = [callback.accept_update(self.state, losses) for callback in self.callbacks]
        self.engine.step(self.state.lr, apply=all(accepted))
        for callback in self.callbacks:
            callback.on_update(self.state, losses, applied=self.engine.applied)
        if self.ema is not None and self.engine.applied:
            with self.engine.whole_parameters():
                self.ema.update(self.state.step)

    def _validate(self) -> None:
        stale = _validation_metrics(self.objective.sample_scores)
        with self.timer.measure("validation"):
            measured = _validation_means(self.objective, self.engine, self.ema)
        self.state.validation = _validation_metrics(measured)
        kept = {k: v for k, v in self.state.metrics.items() if k not in stale}
        self.state.metrics = kept | self.state.validation | _validation_metrics(self.objective.sample_scores)
        for callback in self.callbacks:
            callback.on_validation_end(self.state)

    def _save(self) -> None:
        state = self.state
        more = {c.state_key: c.state_dict() for c in self.callbacks if c.state_key is not None}
        required = state.is_last or state.is_interrupted
        with self.timer.measure("checkpoint"):
            saved = self.checkpoints.save(state.step, metrics=state.validation, more=more, required=required)
        if saved:
            fault_point("training.after_checkpoint", step=state.step - 1)
        for callback in self.callbacks:
            callback.on_checkpoint(state, saved=saved)

    def _position(self, step: int) -> TrainingPosition:
        epoch, offset = divmod(step, self.order.n_steps_per_epoch)
        return TrainingPosition(step, epoch, offset, self.world_size, self.run.config_hash, self.config.zero_stage)


def _validation_metrics(values: Mapping[str, float]) -> dict[str, float]:
    return {f"val/{k}": v for k, v in values.items()}


def _validation_means(objective: Objective, engine: Engine, ema: EMA | None) -> dict[str, float]:
    """Return means over the validation cells, by name; `loss` is one of them. Collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with engine.whole_parameters(), torch.no_grad():
        if ema is not None and objective.validate_with_ema:
            with ema.swapped(engine.module):
                totals, n = objective.validation(rank, world_size)
        else:
            totals, n = objective.validation(rank, world_size)
    sums = torch.tensor([*totals.values(), n], dtype=torch.float64, device=engine.device)
    dist.all_reduce(sums)
    return dict(zip(totals, (sums[:-1] / sums[-1]).tolist(), strict=True))
