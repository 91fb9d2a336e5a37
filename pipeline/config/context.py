"""What a stage receives besides its settings, and what it may report to the tracking server."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.resources import CheckpointStorage, ResourcesConfig
from pipeline.core.manifest import Manifest
from scldm.generation.request import Request


class Tracker(Protocol):
    """The tracking run of a stage. No method raises or waits; `pipeline.tracking.tracker` implements it."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step."""

    def tag(self, key: str, value: Any) -> None:
        """Set a tag of the run."""

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Store a file or folder with the run."""

    def spec(self) -> dict[str, Any]:
        """Return plain data from which a worker attaches to the same run."""


@dataclass
class StageContext:
    """Everything that a stage's function receives besides its settings."""

    folder: Path  # the stage's own folder; it exists
    inputs: Mapping[str, Manifest]  # stage -> manifest of each input
    seed: int
    resources: ResourcesConfig
    tracker: Tracker
    output: Path | None = None  # root folder of all pipelines, for what they share
    checkpoints: CheckpointStorage = field(default_factory=CheckpointStorage)
    request: Request | None = None  # of generate, resolved before anything was computed
    started: float = field(default_factory=time.time)
