"""Generate cells for a table of conditions: a Ray Data batch job over shards.

A shard is a function of (models, sampler, seed, request, shard number, precision, kind of device); an actor makes and
commits it (`pipeline.inference.generator`). Readers trust the stage's manifest, which lists the committed shards. A job
that was interrupted makes the shards that are missing, in the precision that it began with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.context import StageContext
from pipeline.config.job import GenerateConfig
from pipeline.config.resources import threads_per_worker
from pipeline.config.stages import LibrarySizesOf
from pipeline.core.faults import VARIABLE, fault_point
from pipeline.core.files import write_json_atomic
from pipeline.core.progress import ProgressReader
from pipeline.core.shards import Record
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.inference.actors.numerics import begin, end
from pipeline.inference.actors.pool import run_on_actors
from pipeline.inference.export.index import write_index
from pipeline.inference.generator import Generator, GeneratorSpec, cell_shards
from pipeline.inference.models import (
    check_folders,
    distilled_generation_problems,
    distilled_of,
    draws_counts,
    flow_start,
    latent_shape,
    named_models,
    vae_config,
)
from pipeline.inference.progress import JobProgress, clear_hints
from pipeline.inference.request import (
    n_shards,
    notes_on,
    read_request,
    recipe_of,
    record_request,
    resolve_request,
    values_problems,
    vectors_of,
)
from pipeline.stages.unseen.finished import BELIEVED, believed, finished_predictions
from scldm.data.cell_counts import SCALE
from scldm.data.library_size import LibrarySizes
from scldm.data.vocabulary import Vocabulary
from scldm.errors import InputError
from scldm.generation.decoder_condition import vectors_digest
from scldm.generation.expression_draw import expression_setting_problem, scale_of
from scldm.generation.request import Request
from scldm.generation.request_table import genes_to_write

PREDICTED = "predicted_errors.json"  # what predict_error says of the request, if it was there at the first shard
SCHEMA_VERSION = 2
EXPRESSION_SCHEMA = 3  # X holds log1p CP10k values: earlier readers would take them for counts
Pool = Callable[[list[int], GeneratorSpec, StageContext], Iterator[Record]]  # makes shards, yields their records
logger = logging.getLogger(__name__)


def ray_pool(shards: list[int], spec: GeneratorSpec, context: StageContext) -> Iterator[Record]:
    """Make shards on Ray actors, or on one without Ray."""
    return run_on_actors(Generator, shards, spec, context.resources, folder=context.folder)


def run(config: GenerateConfig, context: StageContext, pool: Pool = ray_pool) -> dict[str, Any]:
    """Run the stage.

    Returns:
        Facts: cells (folder), shards (file, n_cells, sha256), index, n_cells, request_digest, notes, cells_per_s,
        precision, device (kind).
    """
    models = _models(config, context)
    request = context.request or _request(config, context, models)
    record_request(context.folder, request)
    folder = context.folder / "cells"
    folder.mkdir(exist_ok=True)
    spec = _with_predictions(config, _spec(config, context, request, models, folder), context, models)
    notes = spec.provenance["notes"]
    for note in notes:
        logger.info("generate: %s", note)
    clear_hints(folder)
    store = cell_shards(folder)
    store.remove_abandoned()  # nobody else writes here: the stage is locked
    records = store.committed()
    begin(folder, records, gpus=context.resources.gpus_per_worker)
    have = {r["shard"] for r in records}
    todo = [k for k in range(n_shards(request, config.shard_size)) if k not in have]
    progress = JobProgress(context.folder, folder, request.n_cells, sum(r["n_cells"] for r in records))
    with ProgressReader(context.folder, "generate"), progress:
        for record in pool(todo, spec, context) if todo else ():
            records.append(record)
            progress.committed(record["n_cells"])
    clear_hints(folder)
    store.remove_abandoned()  # of actors that were killed
    records.sort(key=lambda r: r["shard"])
    n_cells = sum(r["n_cells"] for r in records)
    if n_cells != request.n_cells or len(records) != n_shards(request, config.shard_size):
        raise RuntimeError(f"{n_cells} cells were made instead of {request.n_cells}; delete {folder} and run again")
    rate = progress.cells_per_s()
    context.tracker.metrics(
        {"gen/cells": float(n_cells), "gen/shards": float(len(records)), "gen/cells_per_s": rate}, step=0
    )
    fault_point("generate.before_manifest")
    facts = {"cells": "cells", "shards": records, "n_cells": n_cells, "request_digest": request.digest}
    facts["index"] = write_index(context.folder, records)
    if SCALE in spec.provenance:
        facts["schema_version"] = EXPRESSION_SCHEMA
    facts |= {"notes": notes, "vae": os.path.relpath(spec.vae, context.folder), **end(folder, records)}
    return facts | ({"cells_per_s": round(rate, 2)} if todo else {})


@dataclass(frozen=True)
class _Models:
    """The models of a job, and what is known of their data."""

    vae: Path
    flow: Path
    latent_shape: tuple[int, int]  # tokens, width
    vocabulary: Vocabulary
    data: IngestedDataset | None  # that the flow was trained on; None if the job names its models
    data_digest: str


def _models(config: GenerateConfig, context: StageContext) -> _Models:
    if config.model is not None:
        named = named_models(config.model, output=context.output, weights=config.sampler.weights)
        assert named.flow is not None
        check_folders(named)
        vocabulary = Vocabulary.load(Path(named.flow) / "vocabulary.json")
        return _Models(Path(named.vae), Path(named.flow), latent_shape(named.vae), vocabulary, None, "")
    vae = context.inputs["train_vae"]
    flow = context.inputs["distil" if config.flow == "distil" else "train_flow"]
    own = flow.facts.get("vae")  # of a flow that was trained together with its VAE
    decoder = vae.path("model") if own is None else Path(flow.folder) / own[config.sampler.weights]
    data = IngestedDataset.open(context.inputs["ingest"])
    tokens, width = vae.facts["latent_shape"]
    return _Models(decoder, flow.path("model"), (tokens, width), data.vocabulary, data, str(data.facts["digest"]))


def _request(config: GenerateConfig, context: StageContext, models: _Models) -> Request:
    if models.data is not None:
        return resolve_request(config, models.data)
    composition: dict[str, Any] = {}
    if config.like is not None:
        composition = {config.like: IngestedDataset.open(context.inputs["ingest"]).composition(config.like)}
    return read_request(config, models.vocabulary, composition)


def _with_predictions(
    config: GenerateConfig, spec: GeneratorSpec, context: StageContext, models: _Models
) -> GeneratorSpec:
    """Return the spec with what a finished predict_error of the pipeline says of its combinations, if it covers them.

    Predictions are of cells from noise. What was decided for the first shard is kept: a job that goes on must give all
    its shards the same columns.
    """
    kept = context.folder / PREDICTED
    if config.start != "noise" or models.data is None or (not kept.is_file() and cell_shards(spec.folder).committed()):
        return spec
    if not kept.is_file():
        labels = [label.name for label in models.vocabulary.labels]
        known = set(models.data.composition("train")[labels].itertuples(index=False, name=None))
        found = finished_predictions(context.folder.parent.parent, context.inputs["ingest"])
        rows = [None if found is None else found.of(row.condition) for row in spec.request.rows]
        classes = [tuple(row.condition.get(x) for x in labels) for row in spec.request.rows]
        unseen = [all(of_row) and of_row not in known for of_row in classes]
        if found is None or not any(unseen) or any(r is None and u for r, u in zip(rows, unseen, strict=True)):
            return spec
        values = [[None if r is None else float(r[c]) for c in BELIEVED] for r in rows]
        notes = [f"{' + '.join(map(str, of_row))}: {believed(r)} ({found.page.name})"
                 for of_row, r in zip(classes, rows, strict=True) if r is not None]  # fmt: skip
        write_json_atomic(kept, {"version": found.version, "rows": values, "notes": notes})
    told = json.loads(kept.read_text())
    notes = [*spec.provenance["notes"], *told["notes"]]
    provenance = {**spec.provenance, "notes": notes, "predict_error": told["version"]}
    prefix = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:8]
    predicted = np.array(told["rows"], dtype=np.float64)  # None: NaN
    return replace(spec, provenance=provenance, prefix=prefix, predicted=predicted)


def _library_sizes(config: GenerateConfig, models: _Models) -> tuple[LibrarySizes, str]:
    """Return the statistics that library sizes are drawn from, and in words where they are from."""
    if not isinstance(config.library_size, LibrarySizesOf):
        return LibrarySizes.load(models.flow / "library_size.json"), str(config.library_size)
    from pipeline.data.sources.library_sizes import read_library_sizes

    place = config.library_size.of
    sizes = read_library_sizes(place, models.vocabulary)
    digest = hashlib.sha256(sizes.to_json().encode()).hexdigest()
    return sizes, f"statistics of {place} (digest {digest[:12]})"


def _spec(
    config: GenerateConfig, context: StageContext, request: Request, models: _Models, folder: Path
) -> GeneratorSpec:
    """Resolve the job to what an actor needs. Raises InputError for what the models cannot do."""
    from scldm.checkpoints.native import folder_digest
    from scldm.flow.transport import generation_start_problem

    sizes, sizes_from = _library_sizes(config, models)
    strategy = json.loads((models.flow / "config.json").read_text())["config"]["strategy"]
    counts = draws_counts(models.vae)
    if problem := generation_start_problem(flow_start(models.flow), config.start):
        raise InputError(f"generate: {problem}")
    distilled = distilled_of(models.flow)
    if problems := distilled_generation_problems(distilled, config):
        raise InputError("\n".join(problems))
    if counts and (problem := expression_setting_problem(config.sampler.expression)):
        raise InputError(f"generate: {problem}")
    if not counts and (problems := values_problems(config, request)):
        raise InputError("\n".join(problems))
    vocabulary = models.vocabulary.extended(row.condition for row in request.rows)
    # Here, so that not every actor refuses it.
    recipe_of(request, config, vocabulary, sizes, strategy, counts=counts, distilled=distilled)
    vectors = vectors_of(config, request, vae_config(models.vae))
    training = None if models.data is None else models.data.composition("train", replayed=True)
    provenance = {
        "schema_version": SCHEMA_VERSION,
        "vae": folder_digest(models.vae),
        "flow": folder_digest(models.flow),
        "sampler": config.sampler.model_dump_json(),
        "seed": config.seed,
        "library_size": sizes_from,
        "request": request.digest,
        "n_genes_decoded": models.vocabulary.n_genes,
        "data": models.data_digest,
        "latent_shape": list(models.latent_shape),
        "notes": notes_on(request, training, sizes, config, counts=counts, vocabulary=vocabulary),
        **scale_of("nb" if counts else "gaussian", config.sampler.expression),
        **vectors_digest(vectors),
        **({} if config.start == "noise" else {"start": config.start}),
        **({} if distilled is None else {"distilled": distilled.model_dump_json()}),
    }
    return GeneratorSpec(
        folder=folder,
        vae=models.vae,
        flow=models.flow,
        config=config,
        request=request,
        genes=genes_to_write(config.genes, models.vocabulary),
        decoder_condition=vectors,
        latent_shape=models.latent_shape,
        threads=threads_per_worker(context.resources),
        library_sizes=sizes,
        prefix=hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:8],
        digits=len(str(max(1, request.n_cells - 1))),
        provenance=provenance,
        run=uuid.uuid4().hex,
        fault=os.environ.get(VARIABLE, ""),
    )
