"""A folder that appears whole or not at all, and replaces only what it knows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scldm.checkpoints.native import CheckpointError


def check_output(out: Path, *, force: bool, is_earlier: Callable[[Path], bool]) -> None:
    """Raise where writing to `out` would destroy something: other files, or an earlier output without `force`.

    Args:
        out: Folder to be written.
        force: Replace an earlier one.
        is_earlier: Whether a folder is an earlier output.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out.is_dir() and is_earlier(out)):
        raise CheckpointError(f"{out} exists and was not made by this command: choose another --out")
    if not force:
        raise CheckpointError(
            f"{out} was made by this command before: choose another --out, or give --force to replace it"
        )


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `out` at the end; after an error `out` is as it was."""
    out = Path(os.path.abspath(out))  # "." and "a/.." have no name to rename to
    staging, old = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
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
