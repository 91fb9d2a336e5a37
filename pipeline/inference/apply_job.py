"""Rows of a source to committed shards: what embed, reconstruct, perturb and log_likelihood share.

What can be wrong with genes, labels and obs is found before anything is computed (`pipeline.inference.rows`). The cells
that were chosen stand in rows.parquet, a row group per shard; actors read their counts out of SOMA (files are first
written to it, as in ingest). A job that was killed makes the shards that are missing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.apply import RealCellsConfig
from pipeline.config.resources import threads_per_worker
from pipeline.core.faults import VARIABLE, fault_point
from pipeline.core.manifest import StageContext
from pipeline.core.progress import ProgressReader, ProgressWriter
from pipeline.inference.applier import RowsActor
from pipeline.inference.export.index import write_index
from pipeline.inference.models import ModelPaths, locate_models
from pipeline.inference.rows import SourceRows, source_rows
from pipeline.inference.shard_pool import committed, made_by_actors

SCHEMA_VERSION = 1
ROWS = "rows.parquet"
Pool = Callable[[list[int], dict[str, Any], StageContext], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Output:
    """What a stage writes of its cells."""

    genes: bool = False  # var holds the model's genes
    counts: bool = False  # X
    mean: bool = False  # layers["mean"]
    obsm: dict[str, int] = field(default_factory=dict)  # name -> width


def run_batches(
    config: RealCellsConfig, context: StageContext, *, stage: str, output: Output, pool: Pool | None = None
) -> dict[str, Any]:
    """Facts: cells (folder), shards (file, n_cells, sha256), index, n_cells, n_empty, genes, notes.

    Args:
        stage: Module of `pipeline.stages` whose `Maker` the actors build.
        pool: Maker of the shards; Ray's actors if None.
    """
    models = locate_models(config, context)
    rows = source_rows(config, context.folder, models)
    folder = context.folder / "cells"
    folder.mkdir(exist_ok=True)
    _forget_other_cells(context.folder, folder, rows.digest)
    n_shards = _write_rows(context.folder / ROWS, rows.table, config.shard_size)
    spec = _spec(stage, config, context, models, rows, output)
    for note in rows.source.notes:
        print(f"{stage}: {note}", flush=True)
    records = _make_all(stage, spec, n_shards, len(rows.table), context, pool or ray_pool)
    made, empty = sum(r["n_cells"] for r in records), sum(r["empty"] for r in records)
    if made + empty != len(rows.table):
        raise RuntimeError(
            f"{made + empty} cells were made instead of {len(rows.table)}; delete {folder} and run again"
        )
    index = write_index(context.folder, records)
    fault_point("cells.before_manifest")
    shutil.rmtree(context.folder / "soma", ignore_errors=True)  # a copy of the input, for the actors
    context.tracker.metrics({f"{stage}/cells": float(made), f"{stage}/shards": float(len(records))}, step=0)
    facts = {"schema_version": SCHEMA_VERSION, "cells": "cells", "shards": records, "index": index, "n_cells": made}
    return facts | {"n_empty": empty, "source": rows.source.description, "notes": rows.source.notes, **rows.facts}


def _spec(
    stage: str, config: RealCellsConfig, context: StageContext, models: ModelPaths, rows: SourceRows, output: Output
) -> dict[str, Any]:
    """What an actor is given, as plain data."""
    return {
        "stage": stage,
        "folder": str(context.folder / "cells"),
        "rows": str(context.folder / ROWS),
        "config": config.model_dump(mode="json"),
        "models": asdict(models),
        "seed": context.seed,
        "fault": os.environ.get(VARIABLE, ""),
        "threads": threads_per_worker(context.resources),
        **{k: getattr(config, k) for k in ("batch_size", "max_genes", "empty_cells")},
        **{"genes_out": output.genes, "counts_out": output.counts, "mean_out": output.mean, "shapes": output.obsm},
        "reader": vars(rows.reader).copy(),
        **{k: getattr(rows, k) for k in ("measured", "obs_columns", "categories")},
        "provenance": _provenance(stage, config, context, models, rows.digest),
    }


def ray_pool(todo: list[int], spec: dict[str, Any], context: StageContext) -> Iterator[dict[str, Any]]:
    return made_by_actors(RowsActor, todo, spec, context.resources)


def _make_all(
    stage: str, spec: dict[str, Any], n_shards: int, n_rows: int, context: StageContext, pool: Pool
) -> list[dict[str, Any]]:
    folder = Path(spec["folder"])
    for left in folder.glob(".part-*.tmp"):  # of a process that was killed; nobody else works here, the stage is locked
        left.unlink()
    records = committed(context.folder, folder)
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
    """One row group per shard; the number of shards."""
    table = pa.Table.from_pandas(rows, preserve_index=False)
    tmp = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, tmp, row_group_size=shard_size)
    tmp.replace(path)
    return -(-len(rows) // shard_size)


def _forget_other_cells(root: Path, folder: Path, digest: str) -> None:
    """Shards of an earlier attempt count only if the input is what it was then."""
    mark = root / "input.json"
    if mark.is_file() and json.loads(mark.read_text())["digest"] == digest:
        return
    for left in folder.glob("part-*"):
        left.unlink()
    mark.write_text(json.dumps({"digest": digest}))


def _provenance(
    stage: str, config: RealCellsConfig, context: StageContext, models: ModelPaths, digest: str
) -> dict[str, Any]:
    from scldm.checkpoints.native import folder_digest

    about = {
        "schema_version": SCHEMA_VERSION,
        "kind": stage,
        "vae": folder_digest(Path(models.vae)),
        "config": config.model_dump_json(),
        "seed": context.seed,
        "cells": digest,
    }
    return about | ({} if models.flow is None else {"flow": folder_digest(Path(models.flow))})
