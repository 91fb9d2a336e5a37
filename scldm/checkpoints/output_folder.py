"""Atomic output folders: complete or absent, replacing only an earlier output."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scldm.errors import CheckpointError


def check_output(out: Path, *, force: bool, is_earlier: Callable[[Path], bool], in_python: bool = False) -> None:
    """Raise CheckpointError if writing to `out` would destroy other files, or an earlier output without `force`.

    Args:
        out: Folder to write.
        force: Replace an earlier output.
        is_earlier: Returns whether a folder is an earlier output.
        in_python: Whether to name arguments of a method in messages, and not options of a command.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out.is_dir() and is_earlier(out)):
        if in_python:
            raise CheckpointError(f"{out} exists and was not written by save_pretrained: choose another folder")
        raise CheckpointError(f"{out} exists and was not written by this command: choose another --out")
    if not force and in_python:
        raise CheckpointError(f"{out} holds a saved model: choose another folder, or pass force=True to replace it")
    if not force:
        raise CheckpointError(
            f"{out} was written by this command before: choose another --out, or give --force to replace it"
        )


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into, renamed to `out` at the end; after an error `out` is unchanged."""
    out = Path(os.path.abspath(out))  # "." and "a/.." have no name to rename to
    staging, old = (out.with_name(f".{out.name}.{os.getpid()}.{suffix}") for suffix in ("tmp", "old"))
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if out.exists():
            out.rename(old)
        try:
            staging.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
