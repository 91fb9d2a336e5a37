"""What a finished predict_error says of the cells of a perturb job, written beside them: columns of obs, and notes.

What was decided for the first shard is kept in the folder of the stage: a job that goes on gives all its shards the
same columns, whatever predict_error finished in the meantime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.apply import PerturbConfig
from pipeline.config.context import StageContext
from pipeline.core.files import write_json_atomic
from pipeline.core.manifest import Manifest, read_manifest
from pipeline.data.loading.blocks import LABEL
from pipeline.inference.apply_job import AddedColumns
from pipeline.inference.models import target_classes
from pipeline.inference.rows import SourceRows
from pipeline.report.combinations import JOIN
from pipeline.stages.unseen.finished import BELIEVED, Predictions, believed, finished_predictions, judged_by
from scldm.data.labels.reserved_names import PREDICTED_COLUMNS
from scldm.data.vocabulary import Vocabulary

KEPT = "predicted_errors.json"  # in the folder of the stage


@dataclass(frozen=True)
class Beside:
    """Adds the columns to the rows of a perturb job."""

    config: PerturbConfig
    context: StageContext
    vocabulary: Vocabulary

    def __call__(self, rows: SourceRows, begun: bool) -> AddedColumns:
        """Return the columns.

        Args:
            rows: Cells of the job.
            begun: Whether shards of these cells are there.
        """
        kept = self.context.folder / KEPT
        told = json.loads(kept.read_text()) if kept.is_file() else {}
        names = [LABEL + label.name for label in self.vocabulary.labels]
        if told.get("cells") != rows.digest:  # made for other cells, or not made
            if begun or not set(names) <= set(rows.table):
                return AddedColumns()
            told = self._told(rows.table[names].drop_duplicates().to_numpy().tolist())
            write_json_atomic(kept, {**told, "cells": rows.digest})
        if not told.get("version"):
            return AddedColumns()
        values = {tuple(row["key"]): row["values"] for row in told["rows"]}
        none = [float("nan")] * len(BELIEVED)
        of_cells = np.array([values.get(tuple(key), none) for key in rows.table[names].to_numpy().tolist()], np.float32)
        columns = dict(zip(PREDICTED_COLUMNS, of_cells.reshape(-1, len(BELIEVED)).T, strict=True))
        return AddedColumns(columns, {"predict_error": told["version"]}, told["notes"])

    def _told(self, keys: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return what is predicted of the combinations that cells with these class ids become; empty if nothing is."""
        found = predictions_of(self.config, self.context.inputs, self.context.folder.parent.parent)
        if found is None:
            return {}
        rows: list[dict[str, Any]] = []
        said: dict[str, Mapping[str, str]] = {}
        to = target_classes(self.config, self.vocabulary)
        for key in keys:
            own = {
                label.name: label.classes[i] if i < len(label.classes) else None
                for label, i in zip(self.vocabulary.labels, key, strict=True)
            }
            condition = {**own, **to}
            if (row := found.of(condition)) is not None:
                rows.append({"key": list(key), "values": [float(row[column]) for column in BELIEVED]})
                said[JOIN.join(str(condition[label]) for label in found.labels)] = row
        notes = [f"{name}: {believed(row)} ({found.page.name} of predict_error {found.version})"
                 for name, row in said.items()]  # fmt: skip
        return {"version": found.version, "rows": rows, "notes": notes} if rows else {}


def predictions_of(config: PerturbConfig, inputs: Mapping[str, Manifest], pipeline: Path) -> Predictions | None:
    """Return what a finished predict_error of the pipeline says of cells that a job makes; None if nothing is.

    Args:
        config: Of the job.
        inputs: Stages that it reads.
        pipeline: Folder of the pipeline.
    """
    if (judged := judged_by(config.model_dump())) is None:
        return None
    method, start = judged
    ingest = inputs.get("ingest")
    if ingest is None and "train_flow" in inputs:  # of a flow alone, which reads no training cells
        ingest = read_manifest(pipeline / "ingest" / inputs["train_flow"].inputs.get("ingest", "none"))
    return None if ingest is None else finished_predictions(pipeline, ingest, method=method, start=start)
