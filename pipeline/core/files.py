"""Files that readers see whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pipeline.core.faults import fault_point


def write_json_atomic(path: Path, value: Any) -> None:
    """Written beside, flushed to disk, renamed into place: readers see the old file or the new one, never half."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with tmp.open("w") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    fault_point("record.before_rename")
    tmp.replace(path)
