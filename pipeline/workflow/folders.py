"""The folders that a job writes to."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.config.job import JobBase
from scldm.errors import InputError

RAY_WORKING_DIRS = "working_dir_files"  # Ray unpacks a job's working_dir below a folder of this name
RAY_PACKAGE_PREFIX = "_ray_pkg_"


def in_ray_package(folder: Path) -> bool:
    """Return whether a folder is Ray's unpacked copy of a working_dir, which Ray deletes after the job."""
    return any(part == RAY_WORKING_DIRS or part.startswith(RAY_PACKAGE_PREFIX) for part in folder.parts)


def output_root(job: JobBase, *, cwd: Path | None = None) -> Path:
    """Return the folder that holds all pipelines.

    A relative path starts at the current folder, or at SCLDM_HOME (~/scldm) if that is Ray's temporary copy.
    """
    if "://" in job.output:
        raise InputError(
            f"output: {job.output}: stages are written with rename, which object stores lack; "
            "use a path that every node mounts (EFS, Filestore, Lustre, NFS), for example /shared/runs"
        )
    root = Path(job.output).expanduser()
    cwd = cwd or Path.cwd()
    if not root.is_absolute():
        home = Path(os.environ.get("SCLDM_HOME") or "~/scldm").expanduser()
        root = (home if in_ray_package(cwd) else cwd) / root
    return root


def pipeline_folder(job: JobBase) -> Path:
    """Return <output root>/<name>, where the stages of this pipeline find each other."""
    return output_root(job) / job.name
