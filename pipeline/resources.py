"""What a job asks of the machines: workers, a fixed number or a range, and a second place for checkpoints."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.data.s3 import S3Config
from scldm.config import StrictModel


class WorkerRange(StrictModel):
    """Training workers that come and go with the nodes: the run starts again from its newest checkpoint with as many
    as there are, and sees the same cells in the same order."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="after")
    def _is_a_range(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not be more than max ({self.max})")
        return self


class ResourcesConfig(StrictModel):
    """What the job asks Ray for."""

    workers: PositiveInt | WorkerRange = 2
    """Training workers: a number, or {min: 1, max: 4} to go on with fewer when nodes die and with more when they come.
    train.feed.lanes must be a multiple of every number of workers that there may be."""
    cpus_per_worker: PositiveFloat = 1
    gpus_per_worker: float = Field(0, ge=0)
    actors: PositiveInt = 2
    """Actors of encode and generate."""

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def world_sizes(self) -> range:
        """Numbers of workers that training may run with."""
        least = self.workers if isinstance(self.workers, int) else self.workers.min
        return range(least, self.most_workers + 1)


class CheckpointStorage(StrictModel):
    """Where checkpoints are copied to, while training goes on."""

    storage_path: str | None = None
    """Folder that outlives the machine (NFS), or s3://bucket/prefix; null copies them nowhere. Under it:
    <name>/<stage>/<version>/step-…, so jobs may share it. Credentials are looked for where AWS's own tools do."""
    region: str | None = None
    """AWS region of an s3:// path."""
    s3: S3Config = S3Config()
    """How s3:// is spoken to; max_parallel is not used here."""
    tries: int = Field(6, ge=1, le=20)
    """Tries of an upload; waits double from 1 s."""
    wait_at_end: PositiveFloat = 600.0
    """Most seconds that the end of training waits for the last upload."""
