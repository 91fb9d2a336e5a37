"""Complete the runs of stages in MLflow from what is on disk: `scldm mlflow sync`.

A run that was never created is created, with its tags and original times. Only what a run lacks is sent, so it is safe
to sync twice, and while the job is running. The store is the one that the stage tracked to, or another one, which then
gets the whole run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.core.manifest import read_manifest
from pipeline.tracking.mlflow_runs.client import explain, mlflow_client
from pipeline.tracking.mlflow_runs.delivery import RunDelivery
from pipeline.tracking.mlflow_runs.runs import OPENING, Opening, ParentRun, PipelineRuns
from pipeline.tracking.provenance import IDS, read_ids
from pipeline.tracking.record_log import PARENT_SPOOL, last_status, read_logs, spools
from scldm.errors import InputError


@dataclass
class Synced:
    """The result for one run."""

    name: str
    run_id: str = ""
    uri: str = ""
    sent: Counter[str] = field(default_factory=Counter)
    spools: list[str] = field(default_factory=list)  # files of version 0.1.0 that were sent and removed
    problem: str = ""  # why the run is not complete

    def text(self) -> str:
        """Return the result in words."""
        counts = ", ".join(f"{n:,} {kind}" for kind, n in self.sent.items()) or "nothing new"
        run = f" -> run {self.run_id} of {self.uri}" if self.run_id else ""
        old = f"\n  sent and removed, of scldm 0.1.0: {', '.join(self.spools)}" if self.spools else ""
        return f"{self.name}: {counts}{run}{old}" + (f"\n  NOT COMPLETE: {self.problem}" if self.problem else "")


def sync(folder: Path, uri: str | None = None) -> list[Synced]:
    """Complete the runs of all stages in a stage's, a pipeline's or an output folder.

    Args:
        uri: Another store than the one that the stages tracked to.

    Raises:
        InputError: No stage in the folder was ever tracked.
    """
    folder = folder.absolute()
    stages = sorted(set(_stages(folder)))
    if not stages:
        raise InputError(
            f"{folder} holds no stage that was tracked; give a pipeline (runs/demo), or a stage's version in it"
        )
    parents: dict[str, ParentRun] = {}
    results = [_sync_stage(stage, parents, uri) for stage in stages]
    return results + [r for parent in parents.values() if (r := _sync_parent(parent)) is not None]


def _stages(folder: Path) -> Iterator[Path]:
    for depth in ("", "*/", "*/*/", "*/*/*/"):
        for mark in (OPENING, IDS):
            yield from (p.parent for p in folder.glob(depth + mark))


def _sync_stage(folder: Path, parents: dict[str, ParentRun], uri: str | None) -> Synced:
    opening, ids = Opening.read(folder), read_ids(folder)
    if opening is not None and uri is not None:
        opening = replace(opening, pipeline=replace(opening.pipeline, uri=uri, local=False))
    result = Synced(f"{folder.parent.name} {folder.name}")
    result.uri = uri or (opening.pipeline.uri if opening is not None else str(ids.get("uri", "")))
    try:
        if opening is not None:
            new = ParentRun(PipelineRuns(opening.pipeline, running=False), folder.parent.parent)
            parent = parents.setdefault(opening.pipeline.key, new)
            client, result.run_id = parent.runs.open_stage(folder, opening)
        elif ids.get("uri") == result.uri:
            client, result.run_id = mlflow_client(result.uri), str(ids["run_id"])
        else:
            result.problem = f"{folder / OPENING} is missing or damaged: the run cannot be created"
            return result
        _complete(result, folder, client)
        if uri is None and not result.problem:
            result.spools = _remove_spools(folder)
    except Exception as error:  # of one stage; the others are synced
        result.problem = explain(error, result.uri)
    return result


def _complete(result: Synced, folder: Path, client: Any) -> None:
    records = read_logs(folder)
    status = last_status(records)
    manifest = read_manifest(folder)
    if manifest is not None and (status is None or status["value"] == "RUNNING"):
        # The stage finished, but its driver was killed before it recorded that.
        records.append({"kind": "status", "value": "FINISHED", "at": int(manifest.finished_at * 1000)})
    delivery = RunDelivery(client, result.run_id, result.name)
    result.sent = delivery.send(records, replay=True)
    if delivery.refused:
        result.problem = f"{result.uri} takes all but: {', '.join(delivery.refused)[:1000]}"


def _remove_spools(folder: Path) -> list[str]:
    """Remove what version 0.1.0 had left undelivered, and return the names."""
    sent = spools(folder)
    for path in sent:
        path.unlink(missing_ok=True)
    return [path.name for path in sent]


def _sync_parent(parent: ParentRun) -> Synced | None:
    """Set the status of the pipeline's own run; None if it has it already."""
    pipeline = parent.runs.pipeline
    result = Synced(f"pipeline {pipeline.name}", uri=pipeline.uri)
    try:
        changed = parent.complete()
    except Exception as error:
        result.problem = explain(error, pipeline.uri)
        return result
    (parent.folder / PARENT_SPOOL).unlink(missing_ok=True)
    result.run_id, result.sent["status"] = parent.runs.parent_id, 1
    return result if changed else None
