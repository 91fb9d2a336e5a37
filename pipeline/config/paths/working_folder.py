"""The folder at which relative paths of a job start: the current one, or SCLDM_HOME for a job that Ray has unpacked."""

from __future__ import annotations

import os
from pathlib import Path

RAY_WORKING_DIRS = "working_dir_files"  # Ray unpacks a job's working_dir below a folder of this name
RAY_PACKAGE_PREFIX = "_ray_pkg_"


def in_ray_package(folder: Path) -> bool:
    """Return whether a folder is Ray's unpacked copy of a working_dir, which Ray deletes after the job."""
    return any(part == RAY_WORKING_DIRS or part.startswith(RAY_PACKAGE_PREFIX) for part in folder.parts)


def working_folder(cwd: Path | None = None) -> Path:
    """Return the current folder, or SCLDM_HOME (~/scldm) if that is Ray's temporary copy."""
    cwd = cwd or Path.cwd()
    return Path(os.environ.get("SCLDM_HOME") or "~/scldm").expanduser() if in_ray_package(cwd) else cwd


def beside_outputs(name: str) -> str:
    """Return the name of a model as an absolute path if it is a relative one that only the working folder has.

    `runs/census` in a job that was sent with its code means the outputs of earlier jobs, not a folder of that copy.
    """
    place = working_folder() / name
    return str(place) if not Path(name).exists() and "://" not in name and place.exists() else name
