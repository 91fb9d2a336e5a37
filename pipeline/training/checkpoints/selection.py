"""Which checkpoint a run goes on from: the newest that verifies, here or in the second place.

What does not verify is named and passed over, or, under `checkpoints.strict_resume`, an error.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.training.checkpoints import manifest as checkpoint
from pipeline.training.checkpoints.manifest import Found
from pipeline.training.checkpoints.remote import Remote
from scldm.errors import InputError


class CannotResume(InputError):
    """What is there is not to be gone on from: raised on all workers, and the same if they start again."""


class Choice:
    """A look at what there is. Of one worker.

    Args:
        root: The stage's checkpoints.
        remote: The second place, if there is one. What is newer there is fetched.
        keep_best: How many checkpoints of lowest validation loss the run keeps, and may want again.
        strict: Whether a checkpoint that does not verify is an error.

    Attributes:
        rejected: Checkpoints that do not verify, each with the reason.
        unreachable: Those of the second place that could not be fetched.
        not_copied: The checkpoint that was chosen, if the second place does not have it.
        copied: The checkpoint that was chosen, if the second place has it.
    """

    def __init__(self, root: Path, remote: Remote | None, *, keep_best: int, strict: bool):
        self.root, self.remote, self.keep_best, self.strict = root, remote, keep_best, strict
        self.rejected: list[str] = []
        self.unreachable: list[str] = []
        self.not_copied: Path | None = None
        self.copied: Path | None = None

    def newest(self) -> Found | None:
        """None where there is nothing to go on from.

        Raises:
            InputError: of a newer version's checkpoint; under `strict`, of one that does not verify.
            OSError: where no checkpoint is here and those of the second place cannot be read; next time they may.
        """
        found, rejected = checkpoint.newest(self.root)
        before = "no other is here" if found is None else f"the newest here that does is {found.folder.name}"
        self._reject([f"{self.root}/{line}" for line in rejected], before)
        if self.remote is None:
            return found
        try:
            there = self.remote.names()
        except OSError as error:
            if found is None:
                raise OSError(f"{self.remote.address} cannot be read, and no checkpoint is here: {error}") from error
            print(f"{self.remote.address} cannot be read, going on from {found.folder}: {error}", flush=True)
            return found
        newer = [name for name in there if found is None or name.split("-w")[0] > found.folder.name.split("-w")[0]]
        for name in newer:
            if (fetched := self._fetch(self.remote, name)) is not None:
                self._fetch_best(self.remote, there)
                self.copied = fetched.folder
                return fetched
        if found is None and self.unreachable:
            raise OSError(f"no checkpoint is here, and what is in the second place: {'; '.join(self.unreachable)}")
        if found is not None and found.folder.name in there:
            self.copied = found.folder
        elif found is not None:
            self.not_copied = found.folder
        return found

    def _fetch_best(self, remote: Remote, there: Sequence[str]) -> None:
        """What the run keeps besides its newest checkpoint it may want again."""
        found = []
        for name in there:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # said when it is wanted itself
                found.append(remote.manifest(name, self.root / ".remote"))
        for name in checkpoint.to_keep(found, keep_last=0, keep_best=self.keep_best):
            if not (self.root / name / checkpoint.MANIFEST).is_file():
                self._fetch(remote, name)

    def _fetch(self, remote: Remote, name: str) -> Found | None:
        """A checkpoint from the second place; None if it cannot be fetched, or does not verify."""
        was_here = (self.root / name).exists()
        try:
            folder = remote.get(name, self.root)
        except OSError as error:  # of the network, or of a full disk here: no damage
            self.unreachable.append(f"{name} cannot be fetched from {remote.address}: {error}")
            print(self.unreachable[-1], flush=True)
            return None
        problem = checkpoint.verify(folder)
        if problem is None:
            return checkpoint.read(folder)
        if not was_here:
            shutil.rmtree(self.root / name, ignore_errors=True)  # a copy of damage would be found again and again
        self._reject([f"{remote.address}/{name}: {problem}"], "of the second place")
        return None

    def _reject(self, lines: Sequence[str], before: str) -> None:
        if lines and self.strict:
            raise InputError(
                f"checkpoints.strict_resume is set, and not every checkpoint verifies ({before}): {'; '.join(lines)}. "
                "Move what is damaged away or set checkpoints.strict_resume=false, and give the same command again"
            )
        for line in lines:
            self.rejected.append(line)
            print(f"checkpoint passed over: {line}", flush=True)
