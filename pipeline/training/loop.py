"""The training loop: the same for the VAE and for the flow, under Ray Train and under torchrun.

A step is one global batch. Its learning rate, its cells and its randomness are functions of (seed, step), so a run
that was killed and goes on from a checkpoint does what the uninterrupted run would have done.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config.job import TrainConfig
from pipeline.core.faults import fault_point
from pipeline.data.loading.feed import feed
from pipeline.data.loading.order import FeedOrder
from pipeline.training.callbacks.early_stopping import BestSoFar
from pipeline.training.callbacks.metrics_log import LOG_EVERY, TrainingCurve
from pipeline.training.callbacks.step_guard import StepGuard, StepLosses
from pipeline.training.callbacks.step_timer import StepClock
from pipeline.training.callbacks.stop_signal import Notice, StopNotice
from pipeline.training.callbacks.stragglers import Pace
from pipeline.training.callbacks.throughput import mfu, peak_flops
from pipeline.training.callbacks.watchdog import Watchdog
from pipeline.training.checkpoints.manager import Keeper
from pipeline.training.checkpoints.manifest import Position
from pipeline.training.engine.deepspeed import Engine
from pipeline.training.objectives.base import Objective
from pipeline.training.out_of_memory import memory_is_explained
from pipeline.training.prefetch import Ready, prefetch
from pipeline.training.state import MeanLoss, Memory, Run, Stopped, Trained
from scldm.optim.adamw import adamw
from scldm.optim.ema import EMA
from scldm.optim.schedule import learning_rate_factor

STOP_MARGIN = 8.0  # seconds before a node goes, and three times what a checkpoint took so far
STOP_WAIT = 20.0  # seconds that an upload may take after a notice; what is left of it, the next start does


def accumulation_of(config: TrainConfig, world_size: int) -> tuple[int, int]:
    """(micro batch size, micro batches per step) of a worker; the global batch is what the config says."""
    rows = config.feed.batch_size // world_size
    micro = min(config.feed.micro_batch_size, rows)
    return micro, -(-rows // micro)


def run_training(
    objective: Objective, source: Any, order: FeedOrder, config: TrainConfig, run: Run, *, ema_config: Any = None
) -> Trained:
    """Train to max_steps, from the newest checkpoint that verifies or from the start. Collective.

    Raises:
        Stopped: on notice; everything up to that step is in a checkpoint.
        TrainingStopped: what the settings say about steps that are not finite.
        OutOfMemory: on the worker that has too little, with the settings that take it.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    micro = accumulation_of(config, world_size)[0]
    with memory_is_explained(config, micro, "between its steps"):
        training = Training(objective, order, config, run, ema_config)
        start = training.resume()
        stop = start if training.memory.best.stopped else config.max_steps
        steps = feed(
            source, order, rank=rank, world_size=world_size, start_step=start, stop_step=stop, micro_batch_size=micro,
            engine=run.feed_engine,
        )  # fmt: skip
        with (
            Watchdog(run.folder, rank=rank, timeout_s=config.step_timeout_s) as training.watchdog,
            closing(prefetch(steps, objective.prepare, training.engine.device)) as ready,
            training.notice.on_sigterm(),
        ):
            for at in training.clock.waiting("data_wait", ready):
                with memory_is_explained(config, micro, f"in step {at.step + 1}"):
                    last = training.take(at)
                if last:
                    break
        fault_point("training.before_export")
        return training.done()


class Training:
    """A run under way: what a step does, and what is done after it."""

    watchdog: Watchdog

    def __init__(self, objective: Objective, order: FeedOrder, config: TrainConfig, run: Run, ema_config: Any):
        self.objective, self.order, self.config, self.run = objective, order, config, run
        self.world_size = dist.get_world_size()
        micro, self.accumulation = accumulation_of(config, self.world_size)
        optimizer = adamw(objective.module, config.optimizer)
        self.engine = Engine(
            objective.module, optimizer, config, micro_batch_size=micro, accumulation=self.accumulation
        )
        with self.engine.whole_parameters():
            self.ema = None if ema_config is None else EMA(self.engine.module, ema_config)
        self.keeper = Keeper(
            run.folder, self.engine, self.ema, self._position, keep_last=config.keep_last,
            keep_best=max(config.keep_best, int(config.export == "best")), remote=run.remote, tries=run.storage.tries,
            wait_at_end=run.storage.wait_at_end, strict=run.storage.strict_resume,
        )  # fmt: skip
        self.memory, self.clock = Memory(StepGuard(config), BestSoFar(config), MeanLoss()), StepClock()
        self.notice = StopNotice(run.folder, run.preempted, margin=lambda: STOP_MARGIN + 3 * self.keeper.longest)
        self.pace = Pace(self.engine.device)
        self.steps = 0  # done
        self.metrics: dict[str, float] = {}
        self.curve: TrainingCurve | None = None

    def resume(self) -> int:
        """Steps that are done."""
        found = self.keeper.resume()
        if found.folder is not None:
            self.memory.load(found.more)
            self.run.tracker.tag("scldm.resumed_from_step", found.step)
        if found.rejected:
            self.run.tracker.metrics({"ckpt/rejected": float(found.rejected)}, step=found.step)
        if dist.get_rank() == 0:
            self.curve = TrainingCurve(
                self.run.folder, self.run.tracker, self.config, found.step, self.order, self._mfu
            )
        self.steps = found.step
        return found.step

    def take(self, at: Ready) -> bool:
        """A step, and what is due after it. Whether it was the last."""
        fault_point("training.before_step", step=at.step)
        self.notice.ask()
        step = self.steps = at.step + 1  # steps done after this one
        lr = self.config.optimizer.lr * learning_rate_factor(at.step, self.config.max_steps, self.config.optimizer)
        with self.clock.of("step"):
            self.memory.losses.add(*self._update(at, lr))
            if self.ema is not None and self.engine.applied:
                with self.engine.whole_parameters():
                    self.ema.update(step)
        fault_point("training.after_step", step=at.step)
        self.watchdog.beat(f"step {step}")
        last = step == self.config.max_steps
        measured: dict[str, float] = {}
        improved = False
        if step % self.config.validate_every == 0 or last:
            measured, improved = self._validated(step)
            last = last or self.memory.best.stopped
        if step % LOG_EVERY == 0 or last:
            self.metrics |= {"train/loss": self.memory.losses.take(), "train/lr": lr, **self.clock.take()}
            self.metrics["train/skipped"] = float(self.memory.guard.skipped)
            self.metrics |= self.pace.take()
            if (line := self.pace.remark(step, self.metrics)) is not None and dist.get_rank() == 0:
                print(line, flush=True)
        if self.curve is not None:
            self.curve.write(step, self.metrics, self.engine.grad_norm, last=last)
        notice = self.notice.answer()
        stop = notice is Notice.STOP and not last
        due = step % self.config.checkpoint_every == 0 or (improved and self.config.export == "best")
        due = due or notice is Notice.SAVE
        if due or last or stop:
            self._save(step, measured, must=last or stop)
        if stop:
            self.keeper.close(most=STOP_WAIT)
            raise Stopped(step)
        self.pace.alone()
        return last

    def done(self) -> Trained:
        """Of the weights that are to become the model."""
        assert self.keeper.latest is not None
        metrics = self.metrics or (self.curve.last() if self.curve is not None else {})
        exported = self.steps
        if self.config.export == "best":
            best = self.keeper.back_to_best()
            exported, metrics = best.position.step, metrics | {"val/loss": best.metrics["val/loss"]}
        return Trained(
            self.engine, self.ema, self.keeper.latest, metrics, self.memory, self.keeper.close, self.clock,
            steps=self.steps, exported=exported,
        )  # fmt: skip

    def _update(self, at: Ready, lr: float) -> tuple[float, int]:
        """One global batch: the sum of its losses over all workers, and its cells; nothing where it was left out."""
        guard, seen = self.memory.guard, StepLosses(self.engine.device)
        parts = list(at.parts())
        for i, (part, batch) in enumerate(parts, start=1):
            loss = self.objective.loss(self.engine, batch, part)
            seen.add(loss, batch.weight, batch.joinids)
            if i == len(parts) or self.config.zero_stage > 1:  # until then nothing is exchanged
                self.pace.meets()
            # The engine divides by accumulation and world size; what remains is the mean over the batch's real cells.
            share = self.accumulation * self.world_size / at.real_cells
            self.engine.backward((loss * batch.weight).sum() * share)
            if i < len(parts):
                self.engine.step(lr)
        total, n_bad = seen.reduced()
        mean = total / at.real_cells
        fault_point("training.before_update", step=at.step)
        self.engine.step(lr, apply=guard.wants(mean, n_bad))
        said = guard.after(at.step + 1, mean, seen, applied=self.engine.applied)
        if said is not None and dist.get_rank() == 0:
            print(said, flush=True)
        return (total, at.real_cells) if self.engine.applied else (0.0, 0)

    def _validated(self, step: int) -> tuple[dict[str, float], bool]:
        """What validation measured, and whether it is the best so far."""
        with self.clock.of("validation"):
            measured = {f"val/{k}": v for k, v in _validate(self.objective, self.engine, self.ema).items()}
        sampled = getattr(self.objective, "sampled", {})  # of worker 0, in some validations of a flow
        self.metrics = {k: v for k, v in self.metrics.items() if not k.startswith("val/gen_")}  # they would be stale
        self.metrics |= measured | {f"val/{k}": v for k, v in sampled.items()}
        self.watchdog.beat(f"validation at step {step}")
        return measured, self.memory.best.see(step, measured["val/loss"])

    def _save(self, step: int, measured: dict[str, float], *, must: bool) -> None:
        with self.clock.of("checkpoint"):
            saved = self.keeper.save(step, metrics=measured, more=self.memory.state(), must=must)
        self.watchdog.beat(f"checkpoint at step {step}")
        if saved:
            fault_point("training.after_checkpoint", step=step - 1)
            self.run.on_checkpoint({"step": step, **self.metrics})

    def _mfu(self, cells_per_s: float) -> float | None:
        device = self.engine.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        peak = peak_flops(name, self.config.precision)
        return (
            None
            if self.run.flops_per_cell is None
            else mfu(self.run.flops_per_cell, cells_per_s, peak, self.world_size)
        )

    def _position(self, step: int) -> Position:
        epoch, offset = divmod(step, self.order.n_steps_per_epoch)
        return Position(step, epoch, offset, self.world_size, self.run.config_hash, self.config.zero_stage)


def _validate(objective: Objective, engine: Engine, ema: EMA | None) -> dict[str, float]:
    """Means over the validation cells, by name; `loss` is one of them."""
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
