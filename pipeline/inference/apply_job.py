"""Applies models to the rows of a source, shard by shard: the job behind embed, reconstruct, perturb, log_likelihood.

Problems with genes, labels and obs are reported before anything is computed (`pipeline.inference.rows`). The selected
cells are listed in rows.parquet, one row group per shard; actors read their counts from SOMA (files are written to SOMA
first, as in ingest). A job that was interrupted makes the shards that are missing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.apply import RealCellsConfig
from pipeline.config.context import StageContext
from pipeline.config.resources import threads_per_worker
from pipeline.core.faults import VARIABLE, fault_point
from pipeline.core.files import replaces
from pipeline.core.progress import ProgressReader, ProgressWriter
from pipeline.core.shards import Record
from pipeline.inference.actors.numerics import begin, end
from pipeline.inference.actors.pool import run_on_actors
from pipeline.inference.applier import Applier, ApplierSpec, OutputLayout, TileProcessor, applied_shards
from pipeline.inference.export.index import write_index
from pipeline.inference.models import ModelPaths, locate_models
from pipeline.inference.rows import SourceRows, source_rows
from scldm.errors import InputError

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1
EXPRESSION_SCHEMA = 3  # X or layers["mean"] holds log1p CP10k values: earlier readers would take them for counts
ROWS = "rows.parquet"
Pool = Callable[[list[int], ApplierSpec, StageContext], Iterator[Record]]  # makes shards, yields their records
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AddedColumns:
    """Columns of obs that a stage knows of the rows before their shards are made."""

    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # name -> value of each row
    origin: Mapping[str, str] = field(default_factory=dict)  # what they are from, for the provenance of the cells
    notes: Sequence[str] = ()


def ray_pool(shards: list[int], spec: ApplierSpec, context: StageContext) -> Iterator[Record]:
    """Make shards on Ray actors, or on one without Ray."""
    return run_on_actors(Applier, shards, spec, context.resources, folder=context.folder)


def run_batches(
    config: RealCellsConfig,
    context: StageContext,
    *,
    stage: str,
    processor: Callable[[ApplierSpec, torch.device], TileProcessor],
    layout: OutputLayout,
    pool: Pool | None = None,
    models: ModelPaths | None = None,
    origin: Mapping[str, str] | None = None,
    prepare: Callable[[SourceRows], None] = lambda rows: None,
    columns: Callable[[SourceRows, bool], AddedColumns] = lambda rows, begun: AddedColumns(),
) -> dict[str, Any]:
    """Make all shards of a stage.

    Args:
        stage: Name of the stage.
        processor: Class that turns tiles of cells into output; built in every actor, so importable by name.
        pool: Makes the shards; Ray actors if None.
        models: Models, if they are not those that the job names or that its pipeline trained.
        origin: What the cells are made by, for their provenance; None: the digests of the models.
        prepare: Called with the selected rows before any shard is made.
        columns: Returns columns of obs for the selected rows; told whether shards of them are there, which must get the
            same columns.

    Returns:
        Facts: cells (folder), shards (file, n_cells, sha256), index, n_cells, n_empty, genes, notes, and precision and
        device (kind) if networks made the cells.
    """
    _require_free(config, stage, layout.own_columns())
    models = models or locate_models(config, context)
    rows = source_rows(config, context.folder, models)
    prepare(rows)
    folder = context.folder / "cells"
    folder.mkdir(exist_ok=True)
    _remove_shards_of_other_input(context.folder, folder, rows.digest)
    added = columns(rows, bool(applied_shards(folder).committed()))
    _require_free(config, stage, added.columns)
    table = rows.table.assign(**{"obs:" + name: values for name, values in added.columns.items()})
    n_shards = _write_rows(context.folder / ROWS, table, config.shard_size)
    made_by = _provenance(stage, config, context, origin or _digests(models), rows.digest) | dict(added.origin)
    spec = ApplierSpec(
        processor=processor, config=config, models=models, layout=layout, folder=folder, rows=context.folder / ROWS,
        reader=rows.reader, measured=rows.measured, obs_columns=[*rows.obs_columns, *added.columns],
        categories=rows.categories,
        provenance=made_by | layout.scale(), seed=context.seed,
        threads=threads_per_worker(context.resources), fault=os.environ.get(VARIABLE, ""),
    )  # fmt: skip
    notes = [*rows.source.notes, *added.notes]
    for note in notes:
        logger.info("%s: %s", stage, note)
    records = _make_all(stage, spec, n_shards, len(rows.table), context, pool or ray_pool)
    n_cells, n_empty = sum(r["n_cells"] for r in records), sum(r["empty"] for r in records)
    if n_cells + n_empty != len(rows.table):
        raise RuntimeError(
            f"{n_cells + n_empty} cells were made instead of {len(rows.table)}; delete {folder} and run again"
        )
    index = write_index(context.folder, records)
    fault_point("cells.before_manifest")
    shutil.rmtree(context.folder / "soma", ignore_errors=True)  # a copy of the input, for the actors
    context.tracker.metrics({f"{stage}/cells": float(n_cells), f"{stage}/shards": float(len(records))}, step=0)
    schema = EXPRESSION_SCHEMA if layout.scale() else SCHEMA_VERSION
    facts = {"schema_version": schema, "cells": "cells", "shards": records, "index": index, "n_cells": n_cells}
    facts |= {"n_empty": n_empty, "source": rows.source.description, "notes": notes, **rows.facts}
    return facts | end(folder, records)


def _require_free(config: RealCellsConfig, stage: str, own: Collection[str]) -> None:
    """Raise InputError if columns of the input are kept whose names the stage gives to its own."""
    if taken := [x for x in config.keep_obs if x in own]:
        raise InputError(
            f"{stage}.keep_obs: {', '.join(taken)}: the output has columns of its own with these names, which would "
            "replace yours; drop them from keep_obs, or rename them in the input"
        )


def _make_all(
    stage: str, spec: ApplierSpec, n_shards: int, n_rows: int, context: StageContext, pool: Pool
) -> list[Record]:
    """Return the records of all shards in order; those that are missing are made."""
    store = applied_shards(spec.folder)
    store.remove_abandoned()  # nobody else writes here: the stage is locked
    records = store.committed()
    begin(spec.folder, records, gpus=context.resources.gpus_per_worker)
    have = {r["shard"] for r in records}
    todo = [k for k in range(n_shards) if k not in have]
    done = sum(r["n_cells"] for r in records)
    progress = ProgressWriter(context.folder)
    with ProgressReader(context.folder, stage):
        for record in pool(todo, spec, context) if todo else ():
            records.append(record)
            done += record["n_cells"]
            progress.update(done, n_rows)
    return sorted(records, key=lambda r: r["shard"])


# ---- files -------------------------------------------------------------------------------------------------------
def _write_rows(path: Path, rows: pd.DataFrame, shard_size: int) -> int:
    """Write one row group per shard; return the number of shards."""
    with replaces(path) as tmp:
        pq.write_table(pa.Table.from_pandas(rows, preserve_index=False), tmp, row_group_size=shard_size)
    return -(-len(rows) // shard_size)


def _remove_shards_of_other_input(root: Path, folder: Path, digest: str) -> None:
    """Remove the shards of an earlier attempt unless its input is known to be the same."""
    mark = root / "input.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # missing, or not written to its end
        if json.loads(mark.read_text())["digest"] == digest:
            return
    for shard in folder.glob("part-*"):
        shard.unlink()
    with replaces(mark) as tmp:
        tmp.write_text(json.dumps({"digest": digest}))


def _provenance(
    stage: str, config: RealCellsConfig, context: StageContext, origin: Mapping[str, str], digest: str
) -> dict[str, Any]:
    about = {
        "schema_version": SCHEMA_VERSION,
        "kind": stage,
        "vae": origin.get("vae"),
        "config": config.model_dump_json(),
        "seed": context.seed,
        "cells": digest,
    }
    return {k: v for k, v in about.items() if v is not None} | {k: v for k, v in origin.items() if k != "vae"}


def _digests(models: ModelPaths) -> dict[str, str]:
    from scldm.checkpoints.native import folder_digest

    digests = {"vae": folder_digest(Path(models.vae))}
    return digests | ({} if models.flow is None else {"flow": folder_digest(Path(models.flow))})
