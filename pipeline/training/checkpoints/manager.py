"""The checkpoints of a run as the loop sees them: resume, save, and at the end wait for the upload.

What a checkpoint holds: weights in fp32 and optimizer state in pieces, the average of the weights, torch's own random
state (ours is a function of seed and step), the position in the data, and in the manifest the schedule's place, the
sums of the training curve, the validation loss and the ids of the tracker's run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from pipeline.core.faults import fault_point
from pipeline.tracking.provenance import read_ids
from pipeline.training.checkpoints import manifest as checkpoint
from pipeline.training.checkpoints.manifest import Failed, Found, Position, Written
from pipeline.training.checkpoints.remote import Remote
from pipeline.training.checkpoints.selection import CannotResume, Choice
from pipeline.training.checkpoints.upload import Uploader
from pipeline.training.engine.deepspeed import Engine
from pipeline.training.engine.state_files import shard_name, write_tensors
from scldm.errors import InputError
from scldm.optim.ema import EMA

EMA_FILE = "average.safetensors"


def random_file(rank: int) -> str:
    return f"random-{rank:05d}.safetensors"


@dataclass(frozen=True)
class Resumed:
    """Where the run goes on."""

    step: int
    folder: Path | None  # None: from the start
    more: Mapping[str, Any]
    rejected: int = 0  # newer checkpoints that do not verify


class Keeper:
    """A run's checkpoints. All methods are collective.

    Args:
        folder: Of the stage.
        position: Of the run after a number of steps.
        remote: The second place, if there is one; rank 0 alone speaks to it.
        strict: Whether a checkpoint that does not verify is an error, not passed over.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        ema: EMA | None,
        position: Callable[[int], Position],
        *,
        keep_last: int,
        keep_best: int,
        remote: Remote | None = None,
        tries: int = 1,
        wait_at_end: float = 600.0,
        strict: bool = False,
    ):
        self.stage_folder, self.root = folder, folder / "checkpoints"
        self.engine, self.ema, self.position = engine, ema, position
        self.keep, self.remote, self.wait_at_end = (keep_last, keep_best), remote, wait_at_end
        self.strict, self.rejected = strict, 0
        self.latest: Path | None = None
        self.failed = 0  # saves in a row
        self.longest = 0.0  # seconds that a save took
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.uploader: Uploader | None = None
        if remote is not None and self.rank == 0:
            self.uploader = Uploader(self.root, remote, self.keep, tries=tries)

    # ---- resume --------------------------------------------------------------------------------------------------
    def resume(self) -> Resumed:
        """Load the newest checkpoint that verifies, here or in the second place, chosen by rank 0 for all.

        Raises:
            CannotResume, OSError: see `Choice.newest`; on all workers, so that none waits for one that has gone.
        """
        found = self._of_rank_0(self._choose)
        if found is None:
            return Resumed(0, None, {}, self.rejected)
        self.engine.load(found.folder, step=found.position.step)
        if self.ema is not None:
            self.ema.load_state_dict(load_file(found.folder / EMA_FILE, device=str(self.engine.device)))
        if found.position.world_size == self.world_size:
            _set_random_state(load_file(found.folder / random_file(self.rank)))
        elif self.rank == 0:
            was = found.position.world_size
            print(f"step {found.position.step} was written by {was} workers, {self.world_size} go on", flush=True)
        self.latest = found.folder
        if self.rank == 0 and not self.rejected:
            self._clear(found.folder)
        return Resumed(found.position.step, found.folder, found.more, self.rejected)

    def back_to_best(self) -> Found:
        """Load the checkpoint with the lowest validation loss.

        Raises:
            CannotResume: on all workers, under `strict`, where that one is damaged.
        """
        found = self._of_rank_0(self._choose_best)
        if found is None:
            raise RuntimeError(
                f"no checkpoint under {self.root} has a validation loss, and train.export is best; run again with "
                "train.export=last"
            )
        if found.folder != self.latest:
            self.engine.load(found.folder, step=found.position.step)
            if self.ema is not None:
                self.ema.load_state_dict(load_file(found.folder / EMA_FILE, device=str(self.engine.device)))
            self.latest = found.folder
        return found

    def _of_rank_0(self, choose: Callable[[], Found | None]) -> Found | None:
        """What rank 0 chooses, or its error, on all workers."""
        chosen: list[Any] = [None]
        if self.rank == 0:
            try:
                chosen = [choose()]
            except (InputError, OSError) as error:
                chosen = [error]
        dist.broadcast_object_list(chosen)
        if isinstance(chosen[0], InputError):
            raise CannotResume(str(chosen[0]))
        if isinstance(chosen[0], OSError):
            raise chosen[0]
        return chosen[0]

    def _choose_best(self) -> Found | None:
        found, rejected = checkpoint.best(self.root)
        for line in rejected:
            print(f"checkpoint passed over, though its validation loss is lower: {line}", flush=True)
        if rejected and self.strict:
            raise InputError(
                f"checkpoints.strict_resume is set, and the best checkpoint does not verify: {'; '.join(rejected)}. "
                "Set checkpoints.strict_resume=false to export the next best, or train.export=last"
            )
        return found

    def _choose(self) -> Found | None:
        choice = Choice(self.root, self.remote, keep_best=self.keep[1], strict=self.strict)
        found = choice.newest()
        if found is not None:
            checkpoint.check_fits(found, self.position(found.position.step))
        self.rejected = len(choice.rejected)
        if choice.not_copied is not None:
            self._upload(choice.not_copied)  # an upload that an earlier attempt did not finish
        if choice.copied is not None and self.uploader is not None and not self.rejected:
            self.uploader.tidy(choice.copied)
        return found

    # ---- save ----------------------------------------------------------------------------------------------------
    def save(self, step: int, *, metrics: Mapping[str, float], more: Mapping[str, Any], must: bool = False) -> bool:
        """Commit a checkpoint. False if it could not be written: said loudly, and the ones before it stay.

        Args:
            metrics: Measured at this very step.
            must: Raise instead of going on without, because the run ends here.
        """
        fault_point("checkpoint.before_save")
        began = time.monotonic()
        state = self.engine.state()
        more = {**more, "tracker": dict(read_ids(self.stage_folder))}

        def write(folder: Path) -> Written:
            table = {shard_name(self.rank, self.world_size): state, random_file(self.rank): _random_state()}
            if self.ema is not None and self.rank == 0:
                table[EMA_FILE] = self.ema.state_dict()
            written: Written = {}
            for name, tensors in table.items():
                fault_point("checkpoint.before_shard")
                written[name] = write_tensors(folder / name, tensors)
                fault_point("checkpoint.after_shard")
            return written

        made = checkpoint.save(self.root, self.position(step), write, metrics=metrics, more=more)
        if isinstance(made, Failed):
            self._say_failed(step, made, must)
            return False
        self.latest, self.failed, self.longest = made, 0, max(self.longest, time.monotonic() - began)
        if self.rank == 0:
            self._upload(made)
            self._retain(made)
        return True

    def _clear(self, newest: Path) -> None:
        """What a kill left between the last save and its retention. It costs room, so an error is worth a line."""
        try:
            self._retain(newest)
        except OSError as error:
            print(f"old checkpoints under {self.root} stay: {error}", flush=True)

    def _retain(self, newest: Path) -> None:
        busy = self.uploader.busy() if self.uploader is not None else frozenset()
        checkpoint.retain(self.root, newest=newest, keep_last=self.keep[0], keep_best=self.keep[1], busy=busy)

    def close(self, most: float = math.inf) -> None:
        """Wait for the last upload, at most so many seconds. Not collective."""
        if self.uploader is not None and not self.uploader.close(min(self.wait_at_end, most)):
            print(
                f"not all checkpoints are under {self.uploader.remote.address}; see {self.root}/uploads.json",
                flush=True,
            )

    def _upload(self, folder: Path) -> None:
        if self.uploader is not None:
            self.uploader.put(folder)

    def _say_failed(self, step: int, failed: Failed, must: bool) -> None:
        self.failed += 1
        before = f"the newest one is {self.latest.name}" if self.latest is not None else "THERE IS NONE YET"
        remedy = "free space there" if failed.disk_full else "check the folder"
        line = f"CHECKPOINT FAILED at step {step} ({self.failed} in a row): {failed.problem}; {before}; {remedy}"
        if must:
            raise OSError(f"{line}, then run the same command: it goes on from there")
        if self.rank == 0:
            print(f"{line}. Training goes on", flush=True)


def _random_state() -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
