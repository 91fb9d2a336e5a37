"""Checkpoints that exist if and only if their MANIFEST.json verifies.

Every worker writes its files into a folder whose name is used once, says their sizes and sha256, and rank 0 writes the
manifest last, by rename. Resuming takes the newest folder that verifies and walks back past the others. A checkpoint
that could not be written (a full disk) is none: what was written of it is removed and the ones before it stay.
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
from pipeline.core.files import write_json_atomic
from scldm.errors import InputError

MANIFEST = "MANIFEST.json"
SCHEMA = 2
DIGEST = "sha256"  # in the manifest, of all else in it
Written = dict[str, tuple[int, str]]  # file name -> (size, sha256)


@dataclass(frozen=True)
class Position:
    """Where training is, and what must be the same for it to go on."""

    step: int
    epoch: int
    offset: int  # global batches of the epoch that are done
    world_size: int
    config_hash: str
    zero_stage: int


@dataclass(frozen=True)
class Found:
    """A checkpoint, by what its manifest says."""

    folder: Path
    position: Position
    metrics: dict[str, float] = field(default_factory=dict)  # measured at this very step
    more: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0


@dataclass(frozen=True)
class Failed:
    """A checkpoint that could not be written, said in one line."""

    problem: str
    disk_full: bool


def save(
    root: Path,
    position: Position,
    write: Callable[[Path], Written],
    *,
    metrics: Mapping[str, float] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path | Failed:
    """Commit a checkpoint, or say why it could not be. Collective: every rank calls it with the same position.

    Args:
        root: The stage's checkpoint folder, seen by all ranks.
        write: Writes this rank's files into the folder it is given; an OSError is a failure of the whole checkpoint.
        metrics: Measured at this step.
        more: Plain data for the manifest; rank 0's counts.
    """
    name = [f"step-{position.step:08d}-w{position.world_size}-{os.urandom(4).hex()}" if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)  # a fresh name: shards of a dead attempt can never be mixed in
    folder = root / str(name[0])
    written: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(written, _attempt(folder, write))
    outcome: list[Any] = [next((w for w in written if isinstance(w, Failed)), None)]
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


def _attempt(folder: Path, write: Callable[[Path], Written]) -> Written | Failed:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write(folder)
    except OSError as error:
        return Failed(f"worker {dist.get_rank()}: {error}", error.errno in (errno.ENOSPC, errno.EDQUOT))


def _commit(folder: Path, manifest: dict[str, Any]) -> Failed | None:
    fault_point("checkpoint.before_manifest")
    try:
        write_json_atomic(folder / MANIFEST, manifest)
    except OSError as error:
        return Failed(f"manifest: {error}", error.errno in (errno.ENOSPC, errno.EDQUOT))
    fault_point("checkpoint.after_manifest")
    return None


# ---- finding -----------------------------------------------------------------------------------------------------
def newest(root: Path) -> tuple[Found | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over.

    Raises:
        InputError: where a newer version of scldm wrote one. To pass over it would be to do its steps again, and to
            remove it in time.
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


def read(folder: Path) -> Found:
    """A checkpoint by its manifest, its files unverified. Raises OSError or ValueError where there is none to read."""
    return _read(folder)[0]


def _read(folder: Path) -> tuple[Found, Written]:
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict):
        raise ValueError(f"it holds a {type(manifest).__name__}, not an object")
    digest = manifest.pop(DIGEST, None)  # absent in those of early versions
    if digest is not None and digest != _digest(manifest):
        raise ValueError("it does not have its own sha256")
    schema = manifest.get("schema")
    if schema != SCHEMA:
        if isinstance(schema, int) and schema > SCHEMA:
            raise InputError(
                f"{folder} was written by a newer version of scldm (schema {schema}, this version reads {SCHEMA}); "
                "upgrade scldm on all nodes, or move this folder away to go on from the checkpoint before it"
            )
        raise ValueError(f"it has schema {schema}, this version reads {SCHEMA}")
    try:
        files: Written = {str(name): (int(size), str(sha)) for name, (size, sha) in manifest["files"].items()}
        size = sum(size for size, _ in files.values())
        found = Found(folder, Position(**manifest["position"]), manifest["metrics"], manifest["more"], size)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it lacks what it should hold ({error})") from error
    return found, files


def _digest(manifest: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(manifest))  # keys are strings then, and sort as those of a file
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if all its files are as they were written. Raises InputError: `newest`."""
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
            if sha256_of(path) != sha256:
                return f"{name} has another sha256"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def check_fits(found: Found, position: Position) -> None:
    """Refuse to go on with what was made under other settings. The number of workers may differ."""
    if found.position.config_hash != position.config_hash:
        raise InputError(
            f"{found.folder} was written under another configuration ({found.position.config_hash}; this run has "
            f"{position.config_hash}); use another output folder"
        )


def sha256_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---- retention ---------------------------------------------------------------------------------------------------
def committed(root: Path) -> list[Found]:
    """Checkpoints whose manifest can be read, newest first; not verified."""
    found = []
    for folder in sorted(root.glob("step-*"), reverse=True):
        try:
            found.append(read(folder))
        except (OSError, ValueError, InputError):
            continue
    return found


def to_keep(found: Sequence[Found], *, keep_last: int, keep_best: int) -> list[str]:
    """Names of the checkpoints that stay: the last ones, and the best by validation loss of those that have one."""
    return [f.folder.name for f in [*found[:keep_last], *_by_loss(found)[:keep_best]]]


def best(root: Path) -> tuple[Found | None, list[str]]:
    """The checkpoint with the lowest validation loss of those that verify and have one; why better ones were passed
    over."""
    rejected: list[str] = []
    for found in _by_loss(committed(root)):
        problem = verify(found.folder)
        if problem is None:
            return found, rejected
        rejected.append(f"{found.folder.name}: {problem}")
    return None, rejected


def _by_loss(found: Sequence[Found]) -> list[Found]:
    scored = [f for f in found if math.isfinite(f.metrics.get("val/loss", math.nan))]
    return sorted(scored, key=lambda f: f.metrics["val/loss"])


def retain(root: Path, *, newest: Path, keep_last: int, keep_best: int, busy: frozenset[str] = frozenset()) -> None:
    """Remove what need not stay, and what was never committed before the newest.

    Args:
        newest: Just committed and so known to be whole: always stays.
        busy: Names that are in use, by an upload.
    """
    stay = {newest.name, *busy, *to_keep(committed(root), keep_last=keep_last, keep_best=keep_best)}
    for folder in sorted(root.glob("step-*")):
        if folder.name not in stay and folder.name < newest.name:
            fault_point("checkpoint.before_remove")
            (folder / MANIFEST).unlink(missing_ok=True)  # first, so that half a folder is never taken for a checkpoint
            fault_point("checkpoint.in_remove")
            shutil.rmtree(folder, ignore_errors=True)
            fault_point("checkpoint.after_remove")


def newest_step(folder: Path) -> int:
    """The last step of a stage that a checkpoint holds."""
    return max((found.position.step for found in committed(folder / "checkpoints")), default=0)
