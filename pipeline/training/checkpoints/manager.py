"""The checkpoints of a run as the loop sees them: resume, save, and wait for uploads at the end.

A checkpoint holds the weights in fp32 and the optimizer state in pieces, the average of the weights, torch's own random
state (ours is a function of seed and step), the position in the data, and in the manifest the state of the callbacks,
the validation loss and the ids of the tracker's run.
"""

from __future__ import annotations

import logging
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

from pipeline.config.resources import CheckpointStorage
from pipeline.core.faults import fault_point
from pipeline.tracking.provenance import read_ids
from pipeline.training.checkpoints import manifest as checkpoint
from pipeline.training.checkpoints.manifest import CheckpointInfo, SaveFailure, TrainingPosition, WrittenFiles
from pipeline.training.checkpoints.remote import Remote
from pipeline.training.checkpoints.selection import CannotResume, CheckpointSelection
from pipeline.training.checkpoints.upload import Uploader
from pipeline.training.engine.deepspeed import Engine
from pipeline.training.engine.state_files import shard_name, write_tensors
from scldm.errors import InputError
from scldm.optim.ema import EMA

EMA_FILE = "average.safetensors"
log = logging.getLogger(__name__)


def random_file(rank: int) -> str:
    """Return the name of the file that holds a rank's random state."""
    return f"random-{rank:05d}.safetensors"


@dataclass(frozen=True)
class ResumePoint:
    """The step from which a run continues."""

    step: int
    folder: Path | None  # None: from the start
    more: Mapping[str, Any]
    rejected: int = 0  # newer checkpoints that do not verify


class CheckpointManager:
    """Saves and loads a run's checkpoints. All methods but `close` are collective.

    Args:
        folder: The stage's folder.
        position: Returns the run's position after a number of steps.
        remote: The remote storage, if there is one; only rank 0 has it.
        storage: How often an upload is tried, how long the end waits for uploads, and whether a checkpoint that does
            not verify is an error.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        ema: EMA | None,
        position: Callable[[int], TrainingPosition],
        *,
        keep_last: int,
        keep_best: int,
        remote: Remote | None = None,
        storage: CheckpointStorage,
    ):
        self.stage_folder, self.root = folder, folder / "checkpoints"
        self.engine, self.ema, self.position = engine, ema, position
        self.keep, self.remote, self.storage = (keep_last, keep_best), remote, storage
        self.rejected = 0
        self.latest: Path | None = None
        self.failed = 0  # saves in a row
        self.longest = 0.0  # seconds that a save took
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.uploader: Uploader | None = None
        if remote is not None and self.rank == 0:
            self.uploader = Uploader(self.root, remote, self.keep, tries=storage.tries)

    # ---- resume --------------------------------------------------------------------------------------------------
    def resume(self) -> ResumePoint:
        """Load the newest checkpoint that verifies, local or remote, selected by rank 0 for all.

        Raises:
            CannotResume, OSError: see `CheckpointSelection.newest`; on all workers, so that none waits for another.
        """
        found = self._select_on_rank_0(self._select_newest)
        if found is None:
            return ResumePoint(0, None, {}, self.rejected)
        self._load(found)
        if found.position.world_size == self.world_size:
            _set_random_state(load_file(found.folder / random_file(self.rank)))
        elif self.rank == 0:
            before = found.position.world_size
            log.info(f"step {found.position.step} was written by {before} workers; {self.world_size} workers resume")
        if self.rank == 0 and not self.rejected:
            self._clear(found.folder)
        return ResumePoint(found.position.step, found.folder, found.more, self.rejected)

    def load_best(self) -> CheckpointInfo:
        """Load the checkpoint with the lowest validation loss.

        Raises:
            CannotResume: on all workers, if that one is damaged and `checkpoints.strict_resume` is set.
        """
        found = self._select_on_rank_0(self._select_best)
        if found is None:
            raise RuntimeError(
                f"no checkpoint under {self.root} has a validation loss, and train.export is best; run again with "
                "train.export=last"
            )
        if found.folder != self.latest:
            self._load(found)
        return found

    def _load(self, found: CheckpointInfo) -> None:
        self.engine.load(found.folder, step=found.position.step)
        if self.ema is not None:
            self.ema.load_state_dict(load_file(found.folder / EMA_FILE, device=str(self.engine.device)))
        self.latest = found.folder

    def _select_on_rank_0(self, select: Callable[[], CheckpointInfo | None]) -> CheckpointInfo | None:
        """Return on all workers what rank 0 selects, or raise its error on all."""
        selected: list[Any] = [None]
        if self.rank == 0:
            try:
                selected = [select()]
            except (InputError, OSError) as error:
                selected = [error]
        dist.broadcast_object_list(selected)
        if isinstance(selected[0], InputError):
            raise CannotResume(str(selected[0]))
        if isinstance(selected[0], OSError):
            raise selected[0]
        return selected[0]

    def _select_best(self) -> CheckpointInfo | None:
        found, rejected = checkpoint.best(self.root)
        for reason in rejected:
            log.warning(f"checkpoint passed over, though its validation loss is lower: {reason}")
        if rejected and self.storage.strict_resume:
            raise InputError(
                f"checkpoints.strict_resume is set, and the best checkpoint does not verify: {'; '.join(rejected)}. "
                "Set checkpoints.strict_resume=false to export the next best, or train.export=last"
            )
        return found

    def _select_newest(self) -> CheckpointInfo | None:
        selection = CheckpointSelection(
            self.root, self.remote, keep_best=self.keep[1], strict=self.storage.strict_resume
        )
        found = selection.newest()
        if found is not None:
            checkpoint.check_fits(found, self.position(found.position.step))
        self.rejected = len(selection.rejected)
        if selection.not_copied is not None:
            self._upload(selection.not_copied)  # an upload that an earlier attempt did not finish
        if selection.copied is not None and self.uploader is not None and not self.rejected:
            self.uploader.clear(selection.copied)
        return found

    # ---- save ----------------------------------------------------------------------------------------------------
    def save(self, step: int, *, metrics: Mapping[str, float], more: Mapping[str, Any], required: bool = False) -> bool:
        """Commit a checkpoint. Return False if it could not be written: that is logged, and the earlier ones stay.

        Args:
            metrics: Measured at this very step.
            more: Plain data for the manifest.
            required: Raise an OSError instead of returning False, because the run ends here.
        """
        fault_point("checkpoint.before_save")
        began = time.monotonic()
        state = self.engine.state()
        more = {**more, "tracker": dict(read_ids(self.stage_folder))}

        def write(folder: Path) -> WrittenFiles:
            table = {shard_name(self.rank, self.world_size): state, random_file(self.rank): _random_state()}
            if self.ema is not None and self.rank == 0:
                table[EMA_FILE] = self.ema.state_dict()
            written: WrittenFiles = {}
            for name, tensors in table.items():
                fault_point("checkpoint.before_shard")
                written[name] = write_tensors(folder / name, tensors)
                fault_point("checkpoint.after_shard")
            return written

        saved = checkpoint.save(self.root, self.position(step), write, metrics=metrics, more=more)
        if isinstance(saved, SaveFailure):
            self._report_failure(step, saved, required)
            return False
        self.latest, self.failed, self.longest = saved, 0, max(self.longest, time.monotonic() - began)
        if self.rank == 0:
            self._upload(saved)
            self._retain(saved)
        return True

    def close(self, max_wait: float = math.inf) -> None:
        """Wait for the last upload, at most `max_wait` seconds. Not collective."""
        if self.uploader is not None and not self.uploader.close(min(self.storage.wait_at_end, max_wait)):
            log.warning(f"not all checkpoints are under {self.uploader.remote.address}; see {self.root}/uploads.json")

    def _clear(self, newest: Path) -> None:
        """Remove what a kill left between the last save and its retention. It costs only space: errors are logged."""
        try:
            self._retain(newest)
        except OSError as error:
            log.warning(f"old checkpoints under {self.root} could not be removed: {error}")

    def _retain(self, newest: Path) -> None:
        busy = self.uploader.busy() if self.uploader is not None else frozenset()
        checkpoint.retain(self.root, newest=newest, keep_last=self.keep[0], keep_best=self.keep[1], busy=busy)

    def _upload(self, folder: Path) -> None:
        if self.uploader is not None:
            self.uploader.put(folder)

    def _report_failure(self, step: int, failure: SaveFailure, required: bool) -> None:
        self.failed += 1
        before = f"the newest one is {self.latest.name}" if self.latest is not None else "THERE IS NONE YET"
        fix = "free space there" if failure.disk_full else "check the folder"
        message = f"CHECKPOINT FAILED at step {step} ({self.failed} in a row): {failure.problem}; {before}; {fix}"
        if required:
            raise OSError(f"{message}, then run the same command: it resumes from there")
        if self.rank == 0:
            log.error(f"{message}. Training goes on")


def _random_state() -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
