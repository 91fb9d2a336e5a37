"""Rows of a source to committed shards: what embed, reconstruct, perturb and log_likelihood share.

Everything that can be wrong with models, genes, labels and obs is found before anything is computed, and said at once.
The cells that were chosen stand in rows.parquet, a row group per shard; actors read their counts out of SOMA (files are
first written to it, as in ingest). A job that was killed makes the shards that are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.actors import actor_pool
from pipeline.cells.actor import JOINID, NAME, RowsActor
from pipeline.cells.index import write_index
from pipeline.cells.models import ModelPaths, locate_models
from pipeline.data.blocks import LABEL, SomaReader
from pipeline.data.filters import check_values, value_filter
from pipeline.data.genes import gene_lut, model_genes
from pipeline.data.presence import GROUP, presence_of_cells
from pipeline.data.sources import OpenSource, open_source
from pipeline.data.validate import did_you_mean, missing
from pipeline.faults import VARIABLE, fault_point
from pipeline.generation_actor import committed
from pipeline.ingest_config import GenesConfig, IngestConfig
from pipeline.progress import ProgressReader, ProgressWriter
from pipeline.real_cells_config import RealCellsConfig, ScoredGenesConfig
from pipeline.stage import InputError, StageContext
from pipeline.training.trainer import threads_per_worker
from scldm.vocabulary import UnknownNameError, Vocabulary

SCHEMA_VERSION = 1
ROWS = "rows.parquet"
OF_THE_COPY = ("obs has no ", "var has no ", "A 10x output has no ")  # notes on the copy in SOMA, which is not kept
FILLED = "unknown"  # what the copy holds in columns that the input has not got
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
    with _own_words():
        source, rows, shared = _prepare(config, context, models)
    folder = context.folder / "cells"
    folder.mkdir(exist_ok=True)
    _forget_other_cells(context.folder, folder, shared["digest"])
    n_shards = _write_rows(context.folder / ROWS, rows, config.shard_size)
    spec = {
        "stage": stage,
        "folder": str(folder),
        "rows": str(context.folder / ROWS),
        "config": config.model_dump(mode="json"),
        "models": asdict(models),
        "seed": context.seed,
        "fault": os.environ.get(VARIABLE, ""),
        "threads": threads_per_worker(context.resources),
        **{k: getattr(config, k) for k in ("batch_size", "max_genes", "empty_cells")},
        **{"genes_out": output.genes, "counts_out": output.counts, "mean_out": output.mean, "shapes": output.obsm},
        **{k: shared[k] for k in ("reader", "measured", "obs_columns", "categories")},
        "provenance": _provenance(stage, config, context, models, shared),
    }
    for note in source.notes:
        print(f"{stage}: {note}", flush=True)
    records = _make_all(stage, spec, n_shards, len(rows), context, pool or ray_pool)
    made, empty = sum(r["n_cells"] for r in records), sum(r["empty"] for r in records)
    if made + empty != len(rows):
        raise RuntimeError(f"{made + empty} cells were made instead of {len(rows)}; delete {folder} and run again")
    index = write_index(context.folder, records)
    fault_point("cells.before_manifest")
    shutil.rmtree(context.folder / "soma", ignore_errors=True)  # a copy of the input, for the actors
    context.tracker.metrics({f"{stage}/cells": float(made), f"{stage}/shards": float(len(records))}, step=0)
    facts = {"schema_version": SCHEMA_VERSION, "cells": "cells", "shards": records, "index": index, "n_cells": made}
    return facts | {"n_empty": empty, "source": source.description, "notes": source.notes, **shared["facts"]}


def ray_pool(todo: list[int], spec: dict[str, Any], context: StageContext) -> Iterator[dict[str, Any]]:
    """Records of the shards to do, as actors commit them."""
    import ray.data

    resources = context.resources
    shards = ray.data.from_items([{"shard": k} for k in todo], override_num_blocks=len(todo))
    made = shards.map_batches(
        RowsActor,
        fn_constructor_args=(spec,),
        batch_size=1,
        batch_format="pyarrow",
        compute=actor_pool(resources, len(todo)),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker or None,
    )
    yield from made.iter_rows()


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


# ---- what is found out before anything is computed ---------------------------------------------------------------
def _prepare(
    config: RealCellsConfig, context: StageContext, models: ModelPaths
) -> tuple[OpenSource, pd.DataFrame, dict[str, Any]]:
    """The source, its rows, and what actors share."""
    presence = isinstance(config.genes, ScoredGenesConfig) and config.genes.presence
    genes_config = GenesConfig(
        vocabulary=models.vae, match=config.genes.match, max_missing=config.genes.max_missing, presence=presence
    )
    like_ingest = IngestConfig(
        source=config.source, labels=[], cells=config.cells, obs_filter=config.obs_filter, genes=genes_config,
        missing_label="drop",
    )  # fmt: skip
    vocabulary = Vocabulary.load(Path(models.vae) / "vocabulary.json")
    lenient = getattr(config, "unknown_labels", "error") == "none"
    needed = [*config.keep_obs, *(_names(vocabulary) if config.uses_labels and not lenient else [])]
    source = open_source(like_ingest, context.folder, list(dict.fromkeys(needed)), min_cells=1)
    source.notes = [n for n in source.notes if not n.startswith(OF_THE_COPY)]
    problems: list[str] = []
    genes = _collected(problems, lambda: model_genes(genes_config, source.store))
    cells = _collected(problems, lambda: _cells(config, source, vocabulary, presence))
    if cells is not None:
        codes = _codes(config, cells, vocabulary, problems)
    if problems or genes is None or cells is None:
        raise InputError("\n".join(problems))
    source.notes += genes.notes
    measured = None
    if presence:
        found = presence_of_cells(source, cells, genes.table["soma_joinid"].to_numpy())
        codes[GROUP], measured = found.group, found.measured
    kept = [
        c for c in cells if c not in (JOINID, NAME, "dataset_id") or c in config.keep_obs or c in _names(vocabulary)
    ]
    rows = pd.DataFrame({JOINID: cells[JOINID], NAME: cells[NAME]})
    rows = rows.assign(**{LABEL + k: v for k, v in codes.items()}, **{"obs:" + c: cells[c] for c in kept})
    reader = SomaReader(
        uri=str((context.folder / "soma").resolve()) if source.uri == "soma" else source.uri,
        tiledb_config=dict(source.store.tiledb_config), measurement=source.store.measurement, layer=source.store.layer,
        gene_lut=gene_lut(genes.table, source.store.shape[1]), labels=tuple(codes), count_type="float32",
    )  # fmt: skip
    digest = hashlib.sha256((source.content or source.store.uri).encode())
    digest.update(pd.util.hash_pandas_object(rows, index=False).to_numpy().tobytes() + reader.gene_lut.tobytes())
    shared = {
        "reader": vars(reader).copy(),
        "measured": measured,
        "obs_columns": kept,
        "categories": _categories(cells, kept, vocabulary),
        "digest": digest.hexdigest(),
        "facts": {**source.facts, **genes.facts},
    }
    return source, rows, shared


def _cells(config: RealCellsConfig, source: OpenSource, vocabulary: Vocabulary, presence: bool) -> pd.DataFrame:
    """soma_joinid, the name of each cell, and the obs columns that are used or kept."""
    available = source.store.obs_columns()
    problems = [
        f"keep_obs: obs has no column {c!r} ({did_you_mean(c, available)})"
        for c in config.keep_obs
        if c not in available
    ]
    if problems:
        raise InputError("\n".join(problems))
    check_values(config.cells, source.store)
    chosen = value_filter(config.cells.conditions(), config.obs_filter)
    extra = ["obs_id", *(["dataset_id"] if presence or source.measured is not None else [])]
    wanted = dict.fromkeys([*config.keep_obs, *_names(vocabulary), *extra])
    cells = source.store.obs([c for c in wanted if c in available], chosen)
    for label in vocabulary.labels:
        if label.name in cells and FILLED not in label.classes and (cells[label.name].astype(str) == FILLED).all():
            cells = cells.drop(columns=label.name)
    if not len(cells):
        raise InputError(f"the filter {chosen!r} (of cells and obs_filter) leaves no cells" if chosen
                         else f"{source.description} holds no cells")  # fmt: skip
    names = cells.pop("obs_id") if "obs_id" in cells else cells[JOINID]
    return cells.assign(**{NAME: _unique(names.astype(str), cells, source)})


def _unique(names: pd.Series, cells: pd.DataFrame, source: OpenSource) -> pd.Series:
    """Names of the input; where several files share names, with the file's before them."""
    if not names.duplicated().any():
        return names
    if "dataset_id" in cells and not (longer := cells["dataset_id"].astype(str) + ":" + names).duplicated().any():
        source.notes.append("obs names are shared between files; they are written as <dataset_id>:<name>.")
        return longer
    twice = names[names.duplicated()].unique()
    raise InputError(
        f"{len(twice)} obs names occur more than once (first: {', '.join(twice[:3])}), so results could not be told "
        "apart; make them unique (adata.obs_names_make_unique())"
    )


def _codes(
    config: RealCellsConfig, cells: pd.DataFrame, vocabulary: Vocabulary, problems: list[str]
) -> dict[str, np.ndarray]:
    """Class ids of the labels that go into the flow; the null id where a cell has none."""
    codes = {}
    lenient = getattr(config, "unknown_labels", "error") == "none"
    for label in vocabulary.labels if config.uses_labels else ():
        if label.name not in cells:
            if lenient:
                codes[label.name] = np.full(len(cells), label.null_id, np.int32)
                continue
            problems.append(
                f"obs has no column {label.name!r}, a label of the model; map one with source.columns: {{{label.name}: "
                "<column of the file>}, or go without: unknown_labels: none"
            )
            continue
        absent = missing(cells[label.name])
        values = cells[label.name].astype(object).astype(str).to_numpy()
        unknown = ~absent & ~np.isin(values, label.classes)
        if (absent | unknown).any() and not lenient:
            problems.append(_unknown_cells(label, values, absent, unknown, cells[NAME]))
            continue
        known = [None if out else v for v, out in zip(values, absent | unknown, strict=True)]
        codes[label.name] = label.encode(known).astype(np.int32)
    return codes


def _unknown_cells(label: Any, values: np.ndarray, absent: np.ndarray, unknown: np.ndarray, names: pd.Series) -> str:
    said = []
    if absent.any():
        said.append(f"{int(absent.sum())} cells have no {label.name} (first: {', '.join(names[absent][:3])})")
    if unknown.any():
        try:
            label.encode(np.unique(values[unknown]))
        except UnknownNameError as error:
            said.append(f"{int(unknown.sum())} cells (first: {', '.join(names[unknown][:3])}): {error}")
    return f"label {label.name}: " + "; ".join(said) + ". Set unknown_labels: none to let them go without"


def _names(vocabulary: Vocabulary) -> list[str]:
    return [x.name for x in vocabulary.labels]


def _categories(cells: pd.DataFrame, kept: list[str], vocabulary: Vocabulary) -> dict[str, list[Any]]:
    """Categories of the columns in every shard: the model's where they hold all, else the input's."""
    of_model = {x.name: list(x.classes) for x in vocabulary.labels}
    found: dict[str, list[Any]] = {}
    for column in kept:
        values = cells[column]
        if column in of_model and values.dropna().astype(str).isin(of_model[column]).all():
            found[column] = of_model[column]
        elif isinstance(values.dtype, pd.CategoricalDtype):
            found[column] = values.cat.categories.tolist()
    return found


def _collected(problems: list[str], ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except InputError as error:
        problems.append(str(error))
        return None


@contextmanager
def _own_words() -> Iterator[None]:
    """Readers speak of ingest.source and ingest.genes; in these jobs the keys stand at the top."""
    try:
        yield
    except InputError as error:
        text = str(error).replace("ingest.genes.vocabulary", "genes").replace("ingest.", "")
        raise InputError(text) from error


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
    stage: str, config: RealCellsConfig, context: StageContext, models: ModelPaths, shared: dict[str, Any]
) -> dict[str, Any]:
    from scldm.checkpoints.native import folder_digest

    about = {
        "schema_version": SCHEMA_VERSION,
        "kind": stage,
        "vae": folder_digest(Path(models.vae)),
        "config": config.model_dump_json(),
        "seed": context.seed,
        "cells": shared["digest"],
    }
    return about | ({} if models.flow is None else {"flow": folder_digest(Path(models.flow))})
