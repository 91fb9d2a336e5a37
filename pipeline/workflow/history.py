"""List the finished stages of a pipeline."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.config.job import OWN_JOBS, STAGES
from pipeline.core.manifest import Manifest, read_manifest
from pipeline.core.text import duration, table
from scldm.errors import InputError


def finished_stages(folder: Path) -> str:
    """Return a table of the finished stages under a pipeline's folder, oldest first."""
    rows = [("stage", "version", "finished", "took", "made from")]
    for m in finished_manifests(folder):
        finished = time.strftime("%Y-%m-%d %H:%M", time.localtime(m.finished_at))
        sources = " ".join(f"{stage}:{version}" for stage, version in m.inputs.items())
        rows.append((m.stage, m.version, finished, duration(m.seconds), sources or "source"))
    return table(rows)


def finished_manifests(folder: Path) -> list[Manifest]:
    """Return the manifests of the finished stages under a pipeline's folder, oldest first.

    Raises:
        InputError: No stage has finished there.
    """
    made = [m for s in (*STAGES, *OWN_JOBS) for d in (folder / s).glob("*/") if (m := read_manifest(d)) is not None]
    if not made:
        raise InputError(f"{folder} holds no finished stage. Give <output>/<name> of a job, for example runs/demo")
    return sorted(made, key=lambda m: m.finished_at)
