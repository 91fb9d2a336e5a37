"""The folders that a job writes to."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.job import JobBase
from pipeline.config.paths.working_folder import working_folder
from scldm.errors import InputError


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
    return root if root.is_absolute() else working_folder(cwd) / root


def pipeline_folder(job: JobBase) -> Path:
    """Return <output root>/<name>, where the stages of this pipeline find each other."""
    return output_root(job) / job.name
