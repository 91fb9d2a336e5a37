"""Resources of a job: training workers (a number or a range), actors, and remote storage of checkpoints."""

from __future__ import annotations

import os
from typing import Any, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from pipeline.config.paths.expand import PathText
from pipeline.config.s3 import S3Client
from scldm.config import StrictModel


class _Range(StrictModel):
    min: PositiveInt
    """Lower bound."""
    max: PositiveInt
    """Upper bound."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not be more than max ({self.max})")
        return self


class WorkerRange(_Range):
    """The number of training workers: a fixed number, or a range.

    With a range the number of workers follows the available nodes: the run restarts from its newest checkpoint with as
    many workers as fit, and sees the same cells in the same order.
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
    """The number of actors of a batch job."""


class ResourcesConfig(StrictModel):
    """Resources that the job requests from Ray."""

    ray: bool = True
    """Whether the job runs on Ray. False: on this machine alone, in child processes: a laptop starts no cluster for a
    small model. The numbers are those of as many workers on Ray."""

    workers: WorkerRange = WorkerRange(min=2, max=2)
    """Training workers: a number, or {min: 1, max: 4} to continue with fewer workers after nodes fail and with more
    when nodes join. train.feed.lanes must be a multiple of every possible number of workers."""
    cpus_per_worker: PositiveFloat = 1
    """CPU cores of a worker or actor."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of a worker or actor: 0 or 1 of a training worker; 0.5: two actors of a batch job share one."""
    actors: PositiveInt | ActorRange = 2
    """Actors of the batch jobs (encode, generate, …). A number is the maximum, starting from one; {min: 2, max: 16}
    starts with min and adds actors while shards wait. Each takes cpus_per_worker and gpus_per_worker."""

    gpu_hour_price: PositiveFloat | None = None
    """Price of one GPU for an hour, in any currency: `scldm plan` then says what stages cost. Null: it says GPU hours
    only."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keep the records of jobs from before these settings existed."""
        newer = (("gpu_hour_price", None), ("ray", True))
        return {k: v for k, v in to_dict(self).items() if (k, v) not in newer}

    @model_validator(mode="after")
    def _one_machine_without_ray(self) -> Self:
        if self.ray:
            return self
        wrong = []
        if self.workers.min < self.workers.max:
            most = self.workers.max
            wrong.append(f"a fixed number of workers, and resources.workers is a range: set resources.workers={most}")
        if self.actors_min > 1:
            wrong.append(f"one actor, and resources.actors starts with {self.actors_min}: set resources.actors=1")
        if self.gpus_per_worker not in (0, 1):
            gpus = f"{self.gpus_per_worker:g}"
            wrong.append(f"one GPU or none, and resources.gpus_per_worker is {gpus}: set resources.gpus_per_worker=1")
        if wrong:
            raise ValueError("resources.ray=false runs with " + "; with ".join(wrong) + "; or set resources.ray=true")
        return self

    @property
    def actors_min(self) -> int:
        return self.actors.min if isinstance(self.actors, ActorRange) else 1

    @property
    def actors_max(self) -> int:
        return self.actors.max if isinstance(self.actors, ActorRange) else self.actors

    @property
    def world_sizes(self) -> range:
        """All possible numbers of training workers."""
        return range(self.workers.min, self.workers.max + 1)


class CheckpointStorage(StrictModel):
    """Remote storage that checkpoints are copied to in the background."""

    storage_path: PathText | None = None
    """Folder on a network file system, or s3://bucket/prefix; null: no copies. Checkpoints are stored under
    <name>/<stage>/<version>/step-…, so jobs may share it. Credentials are found as by AWS's own tools."""
    region: str | None = None
    """AWS region of an s3:// path."""
    s3: S3Client = S3Client()
    """S3 requests."""
    tries: int = Field(6, ge=1, le=20)
    """Attempts of an upload; the wait between them starts at 1 s and doubles."""
    wait_at_end: PositiveFloat = 600.0
    """Longest time that the end of training waits for the last upload."""
    strict_resume: bool = False
    """Whether a damaged checkpoint is an error at the start, with its name and what is wrong. false skips it, reports
    it in the log and as ckpt/rejected in MLflow, and resumes from the newest one that verifies."""


def threads_per_worker(resources: ResourcesConfig) -> int:
    """Return the number of torch threads: as requested, at most the machine's cores."""
    return max(1, min(int(resources.cpus_per_worker), os.cpu_count() or 1))
