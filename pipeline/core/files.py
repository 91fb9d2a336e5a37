"""Atomic writes: readers see the old file or the new one, never a part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pipeline.core.faults import fault_point

REPOSITORY = Path(__file__).resolve().parents[2]
"""Folder that holds the packages: the root of a source checkout, or site-packages."""


def write_json_atomic(path: Path, value: Any) -> None:
    """Write JSON so that readers see the old file or the new one, never a part.

    The text is written to a temporary file in the same folder, flushed to disk and renamed into place.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with tmp.open("w") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    fault_point("record.before_rename")
    tmp.replace(path)
