"""One result of `scldm doctor`, and what a job asks of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    status: Literal["ok", "fail", "skip"]
    says: str
    mend: str = ""

    def line(self) -> str:
        mark = {"ok": "ok  ", "fail": "FAIL", "skip": "-   "}[self.status]
        return f"{mark}  {self.check:<9} {self.says}" + (f"\n                mend: {self.mend}" if self.mend else "")


@dataclass(frozen=True)
class Asked:
    """What is looked at: of a job, or what a machine without one should have."""

    output: Path
    gpus: bool = False
    census: bool = True  # without a job it is not known that it is not needed
    tracking: str | None = None
    storage: Any = None  # pipeline.config.resources.CheckpointStorage
    address: str | None = None  # of the job server, if there is one to ask
