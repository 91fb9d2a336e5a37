"""What the pipeline that trained a model left beside it: its metrics by step, and the report of its cells."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from scldm.api.folders import MANIFEST, ModelFolders, Weights
from scldm.api.origin import evaluations
from scldm.errors import CheckpointError

METRICS = "metrics.jsonl"  # of a training, a row for each logged step
HEIGHT = 800  # of a report in a notebook, pixels


@dataclass(frozen=True)
class Report:
    """The report of an evaluation. A notebook shows it."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        page = html.escape(self.path.read_text(), quote=True)
        return f'<iframe srcdoc="{page}" width="100%" height="{HEIGHT}"></iframe>'


def history(folders: ModelFolders) -> pd.DataFrame:
    """Return the metrics of the trainings of a VAE and a flow, indexed by stage and step.

    Raises:
        CheckpointError: The models lie outside of the folders of their trainings.
    """
    found = [table for folder in (folders.vae, folders.flow) if folder is not None for table in _metrics(folder.parent)]
    if not found:
        raise CheckpointError(
            f"{folders.vae} is a copy: the metrics of its training stay in the folder of the pipeline that trained it"
        )
    return pd.concat(found)


def newest_report(folders: ModelFolders) -> Report:
    """Return the report of the newest evaluation of the flow's cells.

    Raises:
        CheckpointError: There is none.
    """
    stage = folders.vae.parent if folders.flow is None else folders.flow.parent
    found = sorted(evaluations(stage), key=lambda m: float(m["finished_at"]))
    pipeline = stage.parent.parent
    if not found:
        raise CheckpointError(f"{pipeline} holds no report of cells of this model: scldm run jobs/evaluate.yaml")
    newest = found[-1]
    return Report(pipeline / "evaluate" / str(newest["version"]) / str(newest["facts"]["report"]))


def start_of(folders: ModelFolders, weights: Weights, how: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `scldm.train` trains on from, for its start_from.

    Raises:
        CheckpointError: The model has raw weights; jobs start at averaged ones.
    """
    if weights == "raw":
        raise CheckpointError(
            f"{folders.flow or folders.vae} was loaded with its raw weights, and training goes on from the averaged "
            "ones: scldm.load(folder, weights='ema').finetune(…)"
        )
    return {"model": folders.vae, "flow": folders.flow, **how}


def name_to_tune(folders: ModelFolders) -> str:
    """Return a name for the pipeline that trains a model on: that of the model's own, and -tuned."""
    stage = folders.vae.absolute().parent
    own = stage.parents[1].name if (stage / MANIFEST).is_file() else stage.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{own}-tuned").lstrip("-._")[:100]


def _metrics(stage: Path) -> Iterator[pd.DataFrame]:
    if not (stage / MANIFEST).is_file() or not (stage / METRICS).is_file():
        return
    rows: list[dict[str, Any]] = [json.loads(line) for line in (stage / METRICS).read_text().splitlines()]
    table = pd.DataFrame(rows).drop(columns="time_ms", errors="ignore").assign(stage=stage.parent.name)
    yield table.set_index(["stage", "step"])
