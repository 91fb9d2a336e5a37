"""Generate cells for a table of conditions: a Ray Data batch job over shards.

A shard is a function of (models, sampler, seed, request, shard number); an actor makes and commits it
(`pipeline.inference.generator`). Readers trust the stage's manifest, which lists the committed shards. A job that was
killed makes what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config.job import GenerateConfig
from pipeline.config.resources import threads_per_worker
from pipeline.core.faults import VARIABLE, fault_point
from pipeline.core.manifest import StageContext
from pipeline.core.progress import ProgressReader
from pipeline.data.ingest.dataset import Ingested
from pipeline.inference.export.index import write_index
from pipeline.inference.generator import Generator
from pipeline.inference.progress import JobProgress, clear_hints
from pipeline.inference.recipe import notes_on, recipe_of
from pipeline.inference.request import Request, genes_to_write, n_shards, read_request
from pipeline.inference.shard_pool import committed, made_by_actors
from scldm.data.library_size import LibrarySizes

SCHEMA_VERSION = 2
Pool = Callable[[list[int], dict[str, Any], StageContext], Iterator[dict[str, Any]]]


def ray_pool(todo: list[int], spec: dict[str, Any], context: StageContext) -> Iterator[dict[str, Any]]:
    return made_by_actors(Generator, todo, spec, context.resources)


def run(config: GenerateConfig, context: StageContext, pool: Pool = ray_pool) -> dict[str, Any]:
    """Facts: cells (folder), shards (file, n_cells, sha256), index, n_cells, request_digest, notes, cells_per_s."""
    data = Ingested.open(context.inputs["ingest"])
    request = read_request(config, data.vocabulary, {config.like: data.composition(config.like)} if config.like else {})
    folder = context.folder / "cells"
    folder.mkdir(exist_ok=True)
    spec = _spec(config, context, request, data, folder)
    for note in spec["provenance"]["notes"]:
        print(f"generate: {note}", flush=True)
    clear_hints(folder)
    records = committed(context.folder, folder)
    have = {r["shard"] for r in records}
    todo = [k for k in range(n_shards(request, config.shard_size)) if k not in have]
    progress = JobProgress(context.folder, folder, request.n_cells, sum(r["n_cells"] for r in records))
    with ProgressReader(context.folder, "generate"), progress:
        for record in pool(todo, spec, context) if todo else ():
            records.append(record)
            progress.committed(record["n_cells"])
    clear_hints(folder)
    records.sort(key=lambda r: r["shard"])
    made = sum(r["n_cells"] for r in records)
    if made != request.n_cells or len(records) != n_shards(request, config.shard_size):
        raise RuntimeError(f"{made} cells were made instead of {request.n_cells}; delete {folder} and run again")
    rate = progress.cells_per_s()
    context.tracker.metrics(
        {"gen/cells": float(made), "gen/shards": float(len(records)), "gen/cells_per_s": rate}, step=0
    )
    fault_point("generate.before_manifest")
    facts = {"cells": "cells", "shards": records, "n_cells": made, "request_digest": request.digest}
    facts["index"] = write_index(context.folder, records)
    facts |= {"notes": spec["provenance"]["notes"], "vae": os.path.relpath(spec["vae"], context.folder)}
    return facts | ({"cells_per_s": round(rate, 2)} if todo else {})


def _spec(
    config: GenerateConfig, context: StageContext, request: Request, data: Ingested, folder: Path
) -> dict[str, Any]:
    """What an actor is given, as plain data."""
    from scldm.checkpoints.native import folder_digest

    vae, flow = context.inputs["train_vae"], context.inputs["train_flow"]
    own = flow.facts.get("vae")  # of a flow that was trained with its VAE
    decoder = vae.path("model") if own is None else Path(flow.folder) / own[config.sampler.weights]
    sizes = LibrarySizes.load(flow.path("model") / "library_size.json")
    strategy = json.loads((flow.path("model") / "config.json").read_text())["config"]["strategy"]
    recipe_of(request, config, data.vocabulary, sizes, strategy)  # what it refuses is said now, not by every actor
    genes = genes_to_write(config.genes, data.vocabulary)
    provenance = {
        "schema_version": SCHEMA_VERSION,
        "vae": folder_digest(decoder),
        "flow": folder_digest(flow.path("model")),
        "sampler": config.sampler.model_dump_json(),
        "seed": config.seed,
        "library_size": str(config.library_size),
        "request": request.digest,
        "n_genes_decoded": data.vocabulary.n_genes,
        "data": str(context.inputs["ingest"].facts["digest"]),
        "latent_shape": list(vae.facts["latent_shape"]),
        "notes": notes_on(request, data.composition("train"), sizes, config),
    }
    return {
        "folder": str(folder),
        "vae": str(decoder),
        "flow": str(flow.path("model")),
        "config": config.model_dump(mode="json"),
        "request": request.as_plain(),
        "genes": None if genes is None else genes.tolist(),
        "threads": threads_per_worker(context.resources),
        "latent_shape": list(vae.facts["latent_shape"]),
        "prefix": hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:8],
        "digits": len(str(max(1, request.n_cells - 1))),
        "provenance": provenance,
        "run": uuid.uuid4().hex,
        "fault": os.environ.get(VARIABLE, ""),
    }
