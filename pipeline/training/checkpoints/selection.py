"""Selects the checkpoint that a run resumes from: the newest that verifies, local or in remote storage.

A checkpoint that does not verify is logged and passed over, or is an error under `checkpoints.strict_resume`.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.training.checkpoints import manifest as checkpoint
from pipeline.training.checkpoints.manifest import CheckpointInfo
from pipeline.training.checkpoints.remote import Remote
from scldm.errors import InputError

log = logging.getLogger(__name__)


class CannotResume(InputError):
    """The checkpoints must not be resumed from. Raised on all workers; a restart would end the same way."""


class CheckpointSelection:
    """Inspects the checkpoints of a run, on one worker.

    Args:
        root: The stage's checkpoint folder.
        remote: The remote storage, if there is one. A newer checkpoint there is downloaded.
        keep_best: How many checkpoints of lowest validation loss the run keeps, and may need again.
        strict: Whether a checkpoint that does not verify is an error.

    Attributes:
        rejected: Checkpoints that do not verify, each with the reason.
        unreachable: Remote checkpoints that could not be downloaded.
        not_copied: The selected checkpoint, if remote storage does not have it.
        copied: The selected checkpoint, if remote storage has it.
    """

    def __init__(self, root: Path, remote: Remote | None, *, keep_best: int, strict: bool):
        self.root, self.remote, self.keep_best, self.strict = root, remote, keep_best, strict
        self.rejected: list[str] = []
        self.unreachable: list[str] = []
        self.not_copied: Path | None = None
        self.copied: Path | None = None

    def newest(self) -> CheckpointInfo | None:
        """Return the newest checkpoint that verifies, or None if there is no checkpoint.

        Raises:
            InputError: if a newer version of scldm wrote a checkpoint; under `strict`, if one does not verify.
            OSError: if no checkpoint is local and the remote ones cannot be read; a later attempt may succeed.
        """
        found, rejected = checkpoint.newest(self.root)
        valid = (
            "there is no other local one" if found is None else f"the newest local one that does is {found.folder.name}"
        )
        self._reject([f"{self.root}/{reason}" for reason in rejected], valid)
        if self.remote is None:
            return found
        try:
            remote_names = self.remote.names()
        except OSError as error:
            if found is None:
                raise OSError(f"{self.remote.address} cannot be read, and no checkpoint is local: {error}") from error
            log.warning(f"{self.remote.address} cannot be read, resuming from {found.folder}: {error}")
            return found
        for name in remote_names:
            if found is not None and name.split("-w")[0] <= found.folder.name.split("-w")[0]:
                continue  # not newer
            if (downloaded := self._download(self.remote, name)) is not None:
                self._download_best(self.remote, remote_names)
                self.copied = downloaded.folder
                return downloaded
        if found is None and self.unreachable:
            raise OSError(f"no checkpoint is local, and the remote ones failed: {'; '.join(self.unreachable)}")
        if found is not None and found.folder.name in remote_names:
            self.copied = found.folder
        elif found is not None:
            self.not_copied = found.folder
        return found

    def _download_best(self, remote: Remote, names: Sequence[str]) -> None:
        """Download what the run keeps besides its newest checkpoint: `train.export: best` may need it."""
        found = []
        for name in names:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # reported if it is selected itself
                found.append(remote.manifest(name, self.root / ".remote"))
        for name in checkpoint.to_keep(found, keep_last=0, keep_best=self.keep_best):
            if not (self.root / name / checkpoint.MANIFEST).is_file():
                self._download(remote, name)

    def _download(self, remote: Remote, name: str) -> CheckpointInfo | None:
        """Download a checkpoint. Return None if that fails, or if it does not verify."""
        was_local = (self.root / name).exists()
        try:
            folder = remote.get(name, self.root)
        except OSError as error:  # of the network, or of a full local disk: not damage
            self.unreachable.append(f"{name} cannot be downloaded from {remote.address}: {error}")
            log.warning(self.unreachable[-1])
            return None
        problem = checkpoint.verify(folder)
        if problem is None:
            return checkpoint.read(folder)
        if not was_local:
            shutil.rmtree(self.root / name, ignore_errors=True)  # a copy of damage would be found again and again
        self._reject([f"{remote.address}/{name}: {problem}"], "in remote storage")
        return None

    def _reject(self, reasons: Sequence[str], valid: str) -> None:
        if reasons and self.strict:
            raise InputError(
                f"checkpoints.strict_resume is set, and not every checkpoint verifies ({valid}): {'; '.join(reasons)}. "
                "Move the damaged ones away or set checkpoints.strict_resume=false, and run the same command again"
            )
        for reason in reasons:
            self.rejected.append(reason)
            log.warning(f"checkpoint passed over: {reason}")
