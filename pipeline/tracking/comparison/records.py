"""Describe one version of a stage, and collect the stages of a pipeline that led to it.

A record comes from a stage's manifest on disk (`from_folder`) or from a run in MLflow (`fetch`). Both name the versions
of the stage's inputs, which is all that is needed to follow a pipeline back to its cells.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.job import IN_ORDER
from pipeline.core.manifest import Manifest, read_manifest
from pipeline.core.nested import flat
from scldm.errors import InputError

SHOWN_FACTS = ("val/loss", "train/loss", "perf/cells_per_s", "perf/mfu")  # of training, in a comparison


@dataclass(frozen=True)
class Measured:
    """A score or loss, and how to read it if that is known."""

    value: float
    floor: float | None = None  # the same score of real cells against real cells
    better: str | None = None  # lower, higher or ideal
    ideal: float | None = None


@dataclass(frozen=True)
class StageRecord:
    """One version of a stage."""

    stage: str
    version: str
    inputs: Mapping[str, str]  # stage -> version
    params: Mapping[str, str]
    metrics: Mapping[str, Measured]
    finished_at: float  # s since the epoch; 0 if it has not finished
    location: str  # folder or run id
    about: Mapping[str, str] = field(default_factory=dict)  # data digest, Census version, code


def with_inputs(last: StageRecord, known: Iterable[StageRecord]) -> list[StageRecord]:
    """Return a record with its inputs and theirs, in the order of the stages."""
    by_version = {(r.stage, r.version): r for r in known}
    found, todo = {last.stage: last}, [last]
    while todo:
        for stage, version in todo.pop().inputs.items():
            record = by_version.get((stage, version))
            if record is not None and stage not in found:
                found[stage] = record
                todo.append(record)
    return sorted(found.values(), key=lambda r: IN_ORDER.index(r.stage) if r.stage in IN_ORDER else len(IN_ORDER))


def select_pipeline(chosen: StageRecord | None, known: Sequence[StageRecord]) -> list[StageRecord]:
    """Return the stages to compare for a chosen one, or for a whole pipeline if `chosen` is None.

    They are those of the newest evaluation that was made from the chosen stage; without one, the stage and its inputs.
    """
    in_pipeline = [r for r in known if r.stage in IN_ORDER]
    latest_first = sorted(in_pipeline, key=lambda r: (IN_ORDER.index(r.stage), r.finished_at), reverse=True)
    if chosen is None:
        return with_inputs(latest_first[0], known)
    if chosen.stage == "evaluate":
        return with_inputs(chosen, known)
    for evaluation in (r for r in latest_first if r.stage == "evaluate"):
        stages = with_inputs(evaluation, known)
        if any((r.stage, r.version) == (chosen.stage, chosen.version) for r in stages):
            return stages
    return with_inputs(chosen, known)


# ---- from disk -----------------------------------------------------------------------------------------------------
def from_folder(folder: Path) -> list[StageRecord]:
    """Return the stages of a pipeline's folder (of its newest evaluation), or of a stage's folder.

    Raises:
        InputError: It holds no finished stage.
    """
    manifest = read_manifest(folder)
    root = folder if manifest is None else folder.parent.parent
    made = [m for stage in IN_ORDER for d in sorted((root / stage).glob("*/")) if (m := read_manifest(d)) is not None]
    if manifest is not None and manifest.stage not in IN_ORDER:
        made.append(manifest)
    if not made:
        raise InputError(
            f"{folder} holds no finished stage; give a pipeline (runs/demo), a stage in it (train_flow/1a2b3c4d5e6f), "
            "an MLflow run id or models:/name@alias"
        )
    chosen = None if manifest is None else record_from_manifest(manifest)
    return select_pipeline(chosen, [record_from_manifest(m) for m in made])


def record_from_manifest(manifest: Manifest) -> StageRecord:
    """Return the record of a manifest and the files in its folder."""
    facts = manifest.facts
    about = {"code": "", "data_digest": str(facts.get("digest", "")), "census_version": facts.get("census_version", "")}
    return StageRecord(
        stage=manifest.stage,
        version=manifest.version,
        inputs=dict(manifest.inputs),
        params={k: str(v) for k, v in flat(manifest.config).items()},
        metrics=_evaluated(manifest) if manifest.stage == "evaluate" else _trained(facts),
        finished_at=manifest.finished_at,
        location=manifest.folder,
        about={k: str(v) for k, v in about.items() if v},
    )


def _trained(facts: Mapping[str, Any]) -> dict[str, Measured]:
    metrics = facts.get("metrics", {})
    found = {k: Measured(float(metrics[k])) for k in SHOWN_FACTS if k in metrics}
    for name in ("n_parameters", "steps", "cells_per_s"):
        if isinstance(facts.get(name), int | float):
            found[name] = Measured(float(facts[name]))
    return found


def _evaluated(manifest: Manifest) -> dict[str, Measured]:
    path = Path(manifest.folder) / "metrics.json"
    try:
        rows = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); delete {manifest.folder} and run evaluate again, it takes its minutes"
        ) from error
    return {
        row["metric"]: Measured(float(row["generated"]), row.get("floor"), row.get("better"), row.get("ideal"))
        for row in rows
        if row.get("generated") is not None
    }
