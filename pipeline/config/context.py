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
    """What a stage and its workers may report to a tracking run. No method raises or waits for a server.

    `pipeline.tracking.tracker` implements it for the driver, for a worker, and for no tracking at all. Beginning and
    ending a run is not part of it: that is the runner's and the worker's entry point's part.
    """

    def metrics(self, values: Mapping[str, float], step: int = 0, *, time_ms: int | None = None) -> None:
        """Log numbers at a step.

        Args:
            time_ms: Given if the caller has written the values to metrics.jsonl, with this time in ms since the epoch.
        """

    def tag(self, key: str, value: Any) -> None:
        """Set a tag of the run."""

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Store a file with the run. It is read later, so it must stay where it is."""

    def spec(self) -> dict[str, Any]:
        """Return plain data from which a worker attaches to the same run; empty if nothing is tracked."""


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
