"""The specification of a training worker: plain data that the driver builds and validates once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from pipeline.config.job import DistilConfig, TrainFlowConfig, TrainVaeConfig
from pipeline.config.resources import CheckpointStorage
from pipeline.core.manifest import Manifest
from scldm.config import StrictModel


class WorkerSpecBase(StrictModel):
    """Everything that a worker needs, whichever network it trains."""

    inputs: dict[str, Manifest]
    folder: Path
    """The stage's folder."""
    version: str
    seed: int
    feed_engine: Literal["ray", "local"]
    tracker: dict[str, Any]
    """See `Tracker.spec`; empty if nothing is tracked."""
    threads: int = 1
    start_from: Path | None = None
    """Folder of the model whose weights training starts from."""
    card: str = ""
    """README of the exported model."""
    storage: CheckpointStorage = CheckpointStorage()
    run_name: str = ""
    """<name>/<stage>/<version>: the run's folder in the remote storage of checkpoints."""
    fault: str | None = None
    """The driver's faults; None: those of the environment."""


class VaeWorkerSpec(WorkerSpecBase):
    """The specification of a worker of train_vae."""

    kind: Literal["vae"] = "vae"
    config: TrainVaeConfig


class FlowWorkerSpec(WorkerSpecBase):
    """The specification of a worker of train_flow."""

    kind: Literal["flow"] = "flow"
    config: TrainFlowConfig


class DistilWorkerSpec(WorkerSpecBase):
    """The specification of a worker of distil."""

    kind: Literal["distil"] = "distil"
    config: DistilConfig
    teacher: Path
    """Model folder of the flow that is distilled."""
    trajectories: dict[str, list[tuple[str, int]]]
    """train and validation -> files with solved trajectories, in `folder`/trajectories, and their numbers of rows."""


AnyWorkerSpec = VaeWorkerSpec | FlowWorkerSpec | DistilWorkerSpec
WorkerSpec = Annotated[AnyWorkerSpec, Field(discriminator="kind")]


def read_spec(path: Path) -> AnyWorkerSpec:
    """Read a specification from a JSON file, as under torchrun. Ray hands the object itself to its workers."""
    adapter: TypeAdapter[AnyWorkerSpec] = TypeAdapter(WorkerSpec)
    return adapter.validate_json(path.read_bytes())
