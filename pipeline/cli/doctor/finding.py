"""One result of `scldm doctor`, and what a job requires of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    status: Literal["ok", "fail", "skip"]
    message: str
    fix: str = ""

    def as_json(self) -> dict[str, str]:
        """Return the finding as it stands in `scldm doctor --json`."""
        return {"check": self.check, "status": self.status, "says": self.message, "mend": self.fix}

    def line(self) -> str:
        """Return the finding as a line for the terminal."""
        mark = {"ok": "ok  ", "fail": "FAIL", "skip": "-   "}[self.status]
        return f"{mark}  {self.check:<9} {self.message}" + (f"\n                fix: {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Requirements:
    """What the checks look for: the requirements of a job, or defaults if no job is given."""

    output: Path
    gpus: bool = False
    census: bool = True  # checked if no job is given, because one may need it
    tracking: str | None = None
    experiment: str | None = None  # of MLflow; None if no job is given: any that a pipeline made
    storage: Any = None  # pipeline.config.resources.CheckpointStorage
    address: str | None = None  # address of the job server, if one is configured
