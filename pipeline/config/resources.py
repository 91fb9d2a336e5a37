"""What a job asks of the machines: workers, a fixed number or a range, and a second place for checkpoints."""

from __future__ import annotations

import os
from typing import Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_serializer, model_validator

from pipeline.config.s3 import S3Client
from scldm.config import StrictModel


class _Range(StrictModel):
    min: PositiveInt
    """The fewest."""
    max: PositiveInt
    """The most."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not be more than max ({self.max})")
        return self


class WorkerRange(_Range):
    """How many training workers there may be. A plain number stands for exactly so many.

    Workers of a range come and go with the nodes: the run starts again from its newest checkpoint with as many as there
    are, and sees the same cells in the same order.
    """

    @model_validator(mode="before")
    @classmethod
    def _a_number_is_a_range(cls, given: Any) -> Any:
        if isinstance(given, int) and not isinstance(given, bool):
            return {"min": given, "max": given}
        if not isinstance(given, (dict, cls)):
            raise ValueError(f"{given!r} is no number of workers, nor a range such as {{min: 1, max: 4}}")
        return given

    @model_serializer
    def _as_written(self) -> int | dict[str, int]:
        return self.min if self.min == self.max else {"min": self.min, "max": self.max}

    def __str__(self) -> str:
        return f"{self.min}" if self.min == self.max else f"every number from {self.min} to {self.max}"


class ActorRange(_Range):
    """How many actors a batch job may have."""


class ResourcesConfig(StrictModel):
    """What the job asks Ray for."""

    workers: WorkerRange = WorkerRange(min=2, max=2)
    """Training workers: a number, or {min: 1, max: 4} to go on with fewer when nodes die and with more when they come.
    train.feed.lanes must be a multiple of every number of workers that there may be."""
    cpus_per_worker: PositiveFloat = 1
    """CPU cores of a worker or actor."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of a worker or actor; 0.5: two actors share one."""
    actors: PositiveInt | ActorRange = 2
    """Actors of the batch jobs (encode, generate): at most so many, from one on; or {min: 2, max: 16}, of which min are
    asked for at once and the rest come while shards wait. Each takes cpus_per_worker and gpus_per_worker (0.5: two
    share a GPU)."""

    @property
    def actors_min(self) -> int:
        return self.actors.min if isinstance(self.actors, ActorRange) else 1

    @property
    def actors_max(self) -> int:
        return self.actors.max if isinstance(self.actors, ActorRange) else self.actors

    @property
    def world_sizes(self) -> range:
        """Numbers of workers that training may run with."""
        return range(self.workers.min, self.workers.max + 1)


class CheckpointStorage(StrictModel):
    """Where checkpoints are copied to, while training goes on."""

    storage_path: str | None = None
    """Folder that outlives the machine (NFS), or s3://bucket/prefix; null copies them nowhere. Under it:
    <name>/<stage>/<version>/step-…, so jobs may share it. Credentials are looked for where AWS's own tools do."""
    region: str | None = None
    """AWS region of an s3:// path."""
    s3: S3Client = S3Client()
    """How s3:// is spoken to."""
    tries: int = Field(6, ge=1, le=20)
    """Tries of an upload; waits double from 1 s."""
    wait_at_end: PositiveFloat = 600.0
    """Most seconds that the end of training waits for the last upload."""
    strict_resume: bool = False
    """Whether a damaged checkpoint ends the run, with its name and what is wrong, before a step is done. false passes
    it over, says so in the log and as ckpt/rejected in MLflow, and goes on from the newest one that verifies."""


def threads_per_worker(resources: ResourcesConfig) -> int:
    """Torch threads: what the job asked for, never more than the machine has."""
    return max(1, min(int(resources.cpus_per_worker), os.cpu_count() or 1))
