"""Checkpoints that exist if and only if their MANIFEST.json verifies.

Every worker writes its files into a folder whose name is used once, says their sizes and sha256, and rank 0 writes the
manifest last, by rename. Resuming takes the newest folder that verifies and walks back past the others. DeepSpeed's
files are pickles: they are opened only after their hash matched a manifest of the run's own folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.stage import InputError, write_json_atomic

MANIFEST = "MANIFEST.json"
SCHEMA = 1


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
    folder: Path
    position: Position


def save(root: Path, position: Position, write: Callable[[Path], None], *, keep_last: int) -> Path:
    """Commit a checkpoint. Collective: every rank calls it with the same position.

    Args:
        root: The stage's checkpoint folder, seen by all ranks.
        write: Writes this rank's files into the folder it is given.
        keep_last: Committed checkpoints that stay.
    """
    name = [f"step-{position.step:08d}-w{position.world_size}-{os.urandom(4).hex()}" if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)  # a fresh name: shards of a dead attempt can never be mixed in
    folder = root / str(name[0])
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    write(folder)
    dist.barrier()
    tables: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(tables, _hash_files(_own_files(folder)))
    if dist.get_rank() == 0:
        files = {k: v for table in tables for k, v in table.items()}
        write_json_atomic(folder / MANIFEST, {"schema": SCHEMA, "position": asdict(position), "files": files})
        _retain(root, keep_last)
    dist.barrier()
    return folder


def newest(root: Path) -> tuple[Found | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over."""
    rejected: list[str] = []
    for folder in sorted(root.glob("step-*"), reverse=True):
        if not (folder / MANIFEST).is_file():
            continue  # never finished: not a checkpoint
        problem = verify(folder)
        if problem is None:
            return Found(folder, Position(**json.loads((folder / MANIFEST).read_text())["position"])), rejected
        rejected.append(f"{folder.name}: {problem}")
    return None, rejected


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if all its files are as they were written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({error})"
    if manifest.get("schema") != SCHEMA:
        return f"its manifest has schema {manifest.get('schema')}, this version reads {SCHEMA}"
    for name, (size, sha256) in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if _sha256(path) != sha256:
            return f"{name} has another sha256"
    return None


def check_fits(found: Found, position: Position) -> None:
    """Refuse to go on with what was made under other circumstances."""
    was = found.position
    if was.config_hash != position.config_hash:
        raise InputError(f"{found.folder} was written under another configuration; use another output folder")
    if was.world_size != position.world_size and was.zero_stage > 0:
        raise InputError(
            f"{found.folder} was written by {was.world_size} workers with ZeRO stage {was.zero_stage}; "
            f"{position.world_size} cannot read their shards; run with resources.workers={was.world_size}, "
            f"or remove the folder {found.folder.parent} to start again"
        )


def _own_files(folder: Path) -> list[Path]:
    """Files that this rank answers for: its shards; rank 0 also for those of no rank."""
    rank = dist.get_rank()
    shards = {p for r in range(dist.get_world_size()) for p in folder.rglob(f"*zero_pp_rank_{r}_*")}
    mine = set(folder.rglob(f"*zero_pp_rank_{rank}_*"))
    others = {p for p in folder.rglob("*") if p.is_file()} - shards if rank == 0 else set()
    return sorted(mine | others)


def _hash_files(files: list[Path]) -> dict[str, tuple[int, str]]:
    table = {}
    for path in files:
        with path.open("rb") as f:
            os.fsync(f.fileno())
        step_folder = next(p for p in path.parents if p.name.startswith("step-"))
        table[str(path.relative_to(step_folder))] = (path.stat().st_size, _sha256(path))
    return table


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _retain(root: Path, keep_last: int) -> None:
    """Remove all but the newest committed checkpoints, and what was never committed before them."""
    committed = sorted((p for p in root.glob("step-*") if (p / MANIFEST).is_file()), reverse=True)
    for folder in sorted(root.glob("step-*")):
        if folder not in committed[:keep_last] and folder.name < committed[0].name:
            shutil.rmtree(folder, ignore_errors=True)
