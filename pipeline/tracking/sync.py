"""Complete the runs of stages from the records that waited on disk. Safe to do twice, and beside a running job.

A run that was never made is made, with its tags and the times at which things happened. What was sent before leaves
nothing new if it is sent again (see `delivery`). The store is the one that the stage tracked to, or one that is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.core.manifest import read_manifest
from pipeline.tracking.mlflow_runs.client import explain, mlflow_client
from pipeline.tracking.mlflow_runs.delivery import Delivery
from pipeline.tracking.mlflow_runs.runs import OPENING, PARENT_SPOOL, Opening, ParentTarget, PipelineRuns
from pipeline.tracking.provenance import IDS, read_ids
from pipeline.tracking.spool import BATCH
from pipeline.tracking.spool_file import Record, append, claim, parse, put_back, waiting
from pipeline.tracking.tracker import SPOOL, SPOOLS
from scldm.errors import InputError

REFUSED = f"refused.{SPOOLS}"


@dataclass
class Synced:
    """What became of one folder's records."""

    name: str
    run_id: str = ""
    uri: str = ""
    sent: Counter[str] = field(default_factory=Counter)
    problem: str = ""  # why some still wait

    def text(self) -> str:
        words = ", ".join(f"{n:,} {kind}" for kind, n in self.sent.items()) or "nothing new"
        run = f" -> run {self.run_id} of {self.uri}" if self.run_id else ""
        return f"{self.name}: {words}{run}" + (f"\n  STILL WAITING: {self.problem}" if self.problem else "")


def sync(folder: Path, uri: str | None = None) -> list[Synced]:
    """Send what waits under a stage's, a pipeline's or an output folder.

    Args:
        uri: Another store than the one that the stages tracked to.

    Raises:
        InputError: nothing there was ever tracked.
    """
    folder = folder.absolute()
    stages = sorted(set(_stages(folder)))
    if not stages:
        raise InputError(
            f"{folder} holds no stage that was tracked; give a pipeline (runs/demo), or a stage's version in it"
        )
    openings = {s: Opening.read(s) for s in stages}
    runs: dict[str, PipelineRuns] = {}
    done = []
    for stage, opening in openings.items():
        if opening is not None and uri is not None:
            opening = replace(opening, pipeline=replace(opening.pipeline, uri=uri, local=False))
        done.append(_stage(stage, opening, runs, uri))
    for of in runs.values():
        _parent(of, done)
    return done


def _stages(folder: Path) -> Iterator[Path]:
    for depth in ("", "*/", "*/*/", "*/*/*/"):
        for mark in (OPENING, IDS):
            yield from (p.parent for p in folder.glob(depth + mark))


def _stage(folder: Path, opening: Opening | None, runs: dict[str, PipelineRuns], uri: str | None) -> Synced:
    ids = read_ids(folder)
    found = Synced(f"{folder.parent.name} {folder.name}")
    found.uri = uri or (opening.pipeline.uri if opening is not None else str(ids.get("uri", "")))
    found.run_id = str(ids.get("run_id", "")) if ids.get("uri") == found.uri else ""
    files = [*waiting(folder, SPOOLS), *waiting(folder, REFUSED)]
    if not files and not found.run_id:
        return found
    try:
        client = mlflow_client(found.uri)
        if files and opening is not None:
            of = runs.setdefault(opening.pipeline.key, PipelineRuns(opening.pipeline, runs_now=False))
            client, found.run_id = of.open_stage(folder, opening)
        delivery = Delivery(client, found.run_id, found.name)
        for path in files:
            _send(path, delivery, found)
        _end(found, folder, client)
    except Exception as error:
        found.problem = explain(error, found.uri)
    return found


def _send(path: Path, delivery: Delivery, found: Synced) -> None:
    """One file of records. What is not taken goes back, and the reason is raised or noted."""
    spool = path.parent / SPOOL
    taken = claim(path)
    if taken is None:
        return
    lines = taken.read_text().splitlines(keepends=True)
    for start in range(0, len(lines), BATCH):
        records = parse(lines[start : start + BATCH], path)
        try:
            refused = delivery.send(records)
        except Exception:
            put_back(taken, spool, lines[start:])
            raise
        found.sent += _counted(records) - _counted(refused)
        if refused:
            append(spool.with_name(f"refused.{SPOOL}"), refused)
            found.problem = f"{len(refused)} records are refused, see {spool.with_name(f'refused.{SPOOL}')}"
    taken.unlink(missing_ok=True)


def _counted(records: list[Record]) -> Counter[str]:
    found: Counter[str] = Counter()
    for r in records:
        names = {"metrics": "points", "system": "points of the machine", "tag": "tags", "artifact": "files"}
        name = names.get(r["kind"], str(r["kind"]))
        found[name] += len(r["value"]) if r["kind"] in ("metrics", "system", "tag", "params") else 1
    return found


def _end(found: Synced, folder: Path, client: Any) -> None:
    """A stage that has its manifest has finished, even if its last word was lost."""
    manifest = read_manifest(folder)
    if manifest is not None and client.get_run(found.run_id).info.status == "RUNNING":
        client.set_terminated(found.run_id, "FINISHED", end_time=int(manifest.finished_at * 1000))
        found.sent["status"] += 1


def _parent(runs: PipelineRuns, done: list[Synced]) -> None:
    """The last word on the pipeline's own run."""
    folder = Path(runs.pipeline.root) / runs.pipeline.name
    found = Synced(f"pipeline {runs.pipeline.name}", uri=runs.pipeline.uri)
    target = ParentTarget(runs, folder)
    for path in waiting(folder, PARENT_SPOOL):
        taken = claim(path)
        if taken is None:
            continue
        lines = taken.read_text().splitlines(keepends=True)
        try:
            target.send(parse(lines, path))
            found.run_id, found.sent["status"] = runs.parent_id, 1
            taken.unlink(missing_ok=True)
        except Exception as error:
            put_back(taken, folder / PARENT_SPOOL, lines)
            found.problem = explain(error, runs.pipeline.uri)
        done.append(found)
