"""Checkpoints that exist if and only if their MANIFEST.json verifies.

Every worker writes its files into a folder whose name is used once and reports their sizes and sha256; rank 0 writes
the manifest last, by rename. Resuming takes the newest folder that verifies and walks back past the others. If a
checkpoint cannot be written (a full disk), its files are removed and the earlier checkpoints stay.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.core.faults import fault_point
from pipeline.core.files import file_digest, write_json_atomic
from scldm.errors import InputError

MANIFEST = "MANIFEST.json"
SCHEMA = 2
DIGEST = "sha256"  # key in the manifest: the hash of everything else in it
WrittenFiles = dict[str, tuple[int, str]]  # file name -> (size, sha256)


@dataclass(frozen=True)
class TrainingPosition:
    """How far training is, and what must be the same for it to resume."""

    step: int
    epoch: int
    offset: int  # global batches of the epoch that are done
    world_size: int
    config_hash: str
    zero_stage: int


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as its manifest describes it."""

    folder: Path
    position: TrainingPosition
    metrics: dict[str, float] = field(default_factory=dict)  # measured at this very step
    more: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0


@dataclass(frozen=True)
class SaveFailure:
    """A checkpoint that could not be written, and the reason in one line."""

    problem: str
    disk_full: bool


def save(
    root: Path,
    position: TrainingPosition,
    write: Callable[[Path], WrittenFiles],
    *,
    metrics: Mapping[str, float] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path | SaveFailure:
    """Commit a checkpoint. Collective: every rank calls it with the same position.

    Args:
        root: The stage's checkpoint folder, shared by all ranks.
        write: Writes this rank's files into the folder it is given; an OSError fails the whole checkpoint.
        metrics: Measured at this step.
        more: Plain data for the manifest; that of rank 0 is used.

    Returns:
        The checkpoint's folder, or why it could not be written; the same on all ranks.
    """
    name = [f"step-{position.step:08d}-w{position.world_size}-{os.urandom(4).hex()}" if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)  # a fresh name: shards of a dead attempt can never be mixed in
    folder = root / str(name[0])
    written: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(written, _attempt(folder, write))
    outcome: list[Any] = [next((w for w in written if isinstance(w, SaveFailure)), None)]
    if dist.get_rank() == 0:
        if outcome[0] is None:
            files = {k: v for table in written for k, v in table.items()}
            about = {"metrics": dict(metrics or {}), "more": dict(more or {})}
            manifest = {"schema": SCHEMA, "position": asdict(position), **about, "files": files}
            outcome[0] = _commit(folder, {**manifest, DIGEST: _digest(manifest)})
        if outcome[0] is not None:
            shutil.rmtree(folder, ignore_errors=True)
    dist.broadcast_object_list(outcome)
    return outcome[0] or folder


def _attempt(folder: Path, write: Callable[[Path], WrittenFiles]) -> WrittenFiles | SaveFailure:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write(folder)
    except OSError as error:
        return SaveFailure(f"worker {dist.get_rank()}: {error}", error.errno in (errno.ENOSPC, errno.EDQUOT))


def _commit(folder: Path, manifest: dict[str, Any]) -> SaveFailure | None:
    fault_point("checkpoint.before_manifest")
    try:
        write_json_atomic(folder / MANIFEST, manifest)
    except OSError as error:
        return SaveFailure(f"manifest: {error}", error.errno in (errno.ENOSPC, errno.EDQUOT))
    fault_point("checkpoint.after_manifest")
    return None


# ---- finding -----------------------------------------------------------------------------------------------------
def newest(root: Path) -> tuple[CheckpointInfo | None, list[str]]:
    """Return the newest checkpoint that verifies, and the reasons why newer ones do not.

    Raises:
        InputError: if a newer version of scldm wrote one. Passing over it would repeat its steps, and remove it later.
    """
    rejected: list[str] = []
    for folder in sorted(root.glob("step-*"), reverse=True):
        if not (folder / MANIFEST).is_file():
            continue  # never finished: not a checkpoint
        problem = verify(folder)
        if problem is None:
            return read(folder), rejected
        rejected.append(f"{folder.name}: {problem}")
    return None, rejected


def read(folder: Path) -> CheckpointInfo:
    """Read a checkpoint's manifest; its files are not verified. Raises OSError or ValueError if it cannot be read."""
    return _read(folder)[0]


def _read(folder: Path) -> tuple[CheckpointInfo, WrittenFiles]:
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict):
        raise ValueError(f"it holds a {type(manifest).__name__}, not an object")
    digest = manifest.pop(DIGEST, None)  # absent in those of early versions
    if digest is not None and digest != _digest(manifest):
        raise ValueError("its content does not match its own sha256")
    schema = manifest.get("schema")
    if schema != SCHEMA:
        if isinstance(schema, int) and schema > SCHEMA:
            raise InputError(
                f"{folder} was written by a newer version of scldm (schema {schema}, this version reads {SCHEMA}); "
                "upgrade scldm on all nodes, or move this folder away to resume from the checkpoint before it"
            )
        raise ValueError(f"it has schema {schema}, this version reads {SCHEMA}")
    try:
        files: WrittenFiles = {str(name): (int(size), str(sha)) for name, (size, sha) in manifest["files"].items()}
        size = sum(size for size, _ in files.values())
        found = CheckpointInfo(
            folder, TrainingPosition(**manifest["position"]), manifest["metrics"], manifest["more"], size
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it lacks a required field ({error})") from error
    return found, files


def _digest(manifest: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(manifest))  # keys are strings then, and sort as those of a file
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def verify(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if all its files are as they were written.

    Raises:
        InputError: if a newer version of scldm wrote it; see `newest`.
    """
    try:
        _, files = _read(folder)
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read: {error}"
    for name, (size, sha256) in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if file_digest(path) != sha256:
                return f"{name} has another sha256"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def check_fits(found: CheckpointInfo, position: TrainingPosition) -> None:
    """Raise an InputError if a checkpoint was written under other settings. The number of workers may differ."""
    if found.position.config_hash != position.config_hash:
        raise InputError(
            f"{found.folder} was written under another configuration ({found.position.config_hash}; this run has "
            f"{position.config_hash}); use another output folder"
        )


# ---- retention ---------------------------------------------------------------------------------------------------
def committed(root: Path) -> list[CheckpointInfo]:
    """Return the checkpoints whose manifest can be read, newest first; not verified."""
    found = []
    for folder in sorted(root.glob("step-*"), reverse=True):
        try:
            found.append(read(folder))
        except (OSError, ValueError, InputError):
            continue
    return found


def to_keep(found: Sequence[CheckpointInfo], *, keep_last: int, keep_best: int) -> list[str]:
    """Return the names of the checkpoints to keep: the last ones, and the best by validation loss of those with one."""
    return [f.folder.name for f in [*found[:keep_last], *_by_loss(found)[:keep_best]]]


def best(root: Path) -> tuple[CheckpointInfo | None, list[str]]:
    """Return the valid checkpoint with the lowest validation loss, and the reasons why better ones do not verify."""
    rejected: list[str] = []
    for found in _by_loss(committed(root)):
        problem = verify(found.folder)
        if problem is None:
            return found, rejected
        rejected.append(f"{found.folder.name}: {problem}")
    return None, rejected


def _by_loss(found: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
    scored = [f for f in found if math.isfinite(f.metrics.get("val/loss", math.nan))]
    return sorted(scored, key=lambda f: f.metrics["val/loss"])


def retain(root: Path, *, newest: Path, keep_last: int, keep_best: int, busy: frozenset[str] = frozenset()) -> None:
    """Remove old checkpoints, and folders older than `newest` that were never committed.

    Args:
        newest: Just committed and so known to be valid: always stays.
        busy: Names that an upload is using.
    """
    stay = {newest.name, *busy, *to_keep(committed(root), keep_last=keep_last, keep_best=keep_best)}
    for folder in sorted(root.glob("step-*")):
        if folder.name not in stay and folder.name < newest.name:
            fault_point("checkpoint.before_remove")
            (folder / MANIFEST).unlink(
                missing_ok=True
            )  # first, so that an incomplete folder is never taken for a checkpoint
            fault_point("checkpoint.in_remove")
            shutil.rmtree(folder, ignore_errors=True)
            fault_point("checkpoint.after_remove")


def newest_step(folder: Path) -> int:
    """Return the last step of a stage that is in a checkpoint; 0 if there is none."""
    return max((found.position.step for found in committed(folder / "checkpoints")), default=0)
