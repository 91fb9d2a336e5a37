"""Generate cells for a table of conditions: a Ray Data batch job over shards.

A shard is a function of (models, sampler, seed, shard number); an actor writes it beside its name and renames it,
then its record. Readers trust the stage's manifest, which lists the committed shards. A job that was killed makes
what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from pipeline.data.ingested import Ingested
from pipeline.generation import Request, n_shards, read_request
from pipeline.job import GenerateConfig
from pipeline.progress import ProgressReader, ProgressWriter
from pipeline.stage import StageContext, write_json_atomic
from pipeline.training.trainer import threads_per_worker
from scldm.flow.config import SamplerConfig
from scldm.vocabulary import Vocabulary

SCHEMA_VERSION = 1


class Generator:
    """A Ray Data actor that holds both models and writes shards."""

    def __init__(self, spec: dict[str, Any]):
        import torch

        from scldm.checkpoints.native import load_flow, load_vae
        from scldm.generate import check_pair

        torch.set_num_threads(spec["threads"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.spec, self.folder = spec, Path(spec["folder"])
        self.sampler = SamplerConfig.model_validate(spec["sampler"])
        self.vae = load_vae(Path(spec["vae"]), device=device)
        self.flow = load_flow(Path(spec["flow"]), weights=self.sampler.weights, device=device)
        check_pair(self.vae, self.flow)

    def __call__(self, shards: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._shard(row) for row in shards.to_pylist()])

    def _shard(self, row: dict[str, Any]) -> dict[str, Any]:
        file = f"part-{row['shard']:05d}.h5ad"
        blocks = json.loads(row["blocks"])
        adata = self._cells(row["start"], [(c, n) for c, n in blocks], row["shard"])
        path = self.folder / file
        tmp = path.with_name(f".{file}.{os.getpid()}.tmp")
        adata.write_h5ad(tmp, compression="gzip", compression_opts=1)
        with tmp.open("rb") as f:
            os.fsync(f.fileno())
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        tmp.replace(path)
        record = {"shard": row["shard"], "file": f"cells/{file}", "n_cells": adata.n_obs, "sha256": sha256}
        write_json_atomic(self.folder / f"{file}.json", record)
        return record

    def _cells(self, start: int, blocks: list[tuple[dict[str, str | None], int]], shard: int) -> anndata.AnnData:
        """Cells `start`, `start + 1`, … with the conditions of `blocks`, in batches."""
        from scldm.generate import generate_cells

        vocabulary = self.flow.vocabulary
        conditions = [c for c, n in blocks for _ in range(n)]
        statistics = [self.flow.library_sizes.of(c) for c, n in blocks for _ in range(n)]
        names = {x.name: [c.get(x.name) for c in conditions] for x in vocabulary.labels}
        ids = {x.name: x.encode(names[x.name]) for x in vocabulary.labels}
        parts = []
        for i in range(0, len(conditions), self.spec["batch_size"]):
            rows = slice(i, min(i + self.spec["batch_size"], len(conditions)))
            parts.append(
                generate_cells(
                    self.vae,
                    self.flow,
                    cell_ids=range(start + rows.start, start + rows.stop),
                    conditions={k: v[rows] for k, v in ids.items()},
                    library=statistics[rows],
                    sampler=self.sampler,
                    seed=self.spec["seed"],
                )
            )
        return to_anndata(parts, names, vocabulary, start=start, shard=shard, spec=self.spec)


def to_anndata(
    parts: list[Any], names: Mapping[str, list[str | None]], vocabulary: Vocabulary, *, start: int, shard: int,
    spec: Mapping[str, Any],
) -> anndata.AnnData:  # fmt: skip
    """The AnnData contract of generated cells (docs: "Generated cells")."""
    width = spec["latent_shape"][0] * spec["latent_shape"][1]
    empty = sp.csr_matrix((0, vocabulary.n_genes), dtype=np.int32)
    counts = sp.vstack([p.counts for p in parts], format="csr") if parts else empty
    n = counts.shape[0]
    ids = np.arange(start, start + n, dtype=np.int64)
    obs = pd.DataFrame(index=pd.Index([f"{spec['prefix']}-{i:0{spec['digits']}d}" for i in ids], dtype=str))
    for label in vocabulary.labels:
        obs[label.name] = pd.Categorical(names[label.name], categories=list(label.classes))
    obs["is_synthetic"] = True
    obs["gen_shard"] = np.int32(shard)
    obs["gen_index"] = ids
    obs["guidance_scale"] = np.full(n, _single(spec["sampler"]["guidance"]), np.float32)
    obs["library_size"] = np.concatenate([p.library_size for p in parts] or [np.zeros(0)]).astype(np.float32)
    obs["total_counts"] = np.asarray(counts.sum(1)).ravel().astype(np.int32)
    obs["n_genes"] = np.diff(counts.indptr).astype(np.int32)
    var = pd.DataFrame(
        {"feature_name": list(vocabulary.feature_names)}, index=pd.Index(vocabulary.feature_ids, name="feature_id")
    )
    latents = np.concatenate([p.latents for p in parts] or [np.zeros((0, width))]).astype(np.float32)
    return anndata.AnnData(counts, obs, var, obsm={"X_scldm": latents}, uns={"scldm": spec["provenance"]})


def _single(guidance: float | Mapping[str, float]) -> float:
    """One number for obs; guidance per label stands in uns."""
    return guidance if isinstance(guidance, int | float) else float("nan")


def run(config: GenerateConfig, context: StageContext) -> dict[str, Any]:
    """Facts: cells (folder), shards (file, n_cells, sha256), n_cells, request_digest."""
    data = Ingested.open(context.inputs["ingest"])
    request = read_request(config, data.vocabulary, {config.like: data.composition(config.like)} if config.like else {})
    folder = context.folder / "cells"
    folder.mkdir(exist_ok=True)
    spec = _spec(config, context, request, folder)
    records = _committed(context.folder, folder)
    have = {r["shard"] for r in records}
    todo = [k for k in range(n_shards(request, config.shard_size)) if k not in have]
    progress = ProgressWriter(context.folder)
    done = sum(r["n_cells"] for r in records)
    with ProgressReader(context.folder, "generate"):
        for record in _generated(todo, request, config, spec, context):
            records.append(record)
            done += record["n_cells"]
            progress.update(done, request.n_cells)
    records.sort(key=lambda r: r["shard"])
    made = sum(r["n_cells"] for r in records)
    if made != request.n_cells:
        raise RuntimeError(f"{made} cells were made instead of {request.n_cells}; delete {folder} and run again")
    context.tracker.metrics({"gen/cells": float(made), "gen/shards": float(len(records))}, step=0)
    facts = {"cells": "cells", "shards": records, "n_cells": made, "request_digest": request.digest}
    return facts | {"vae": os.path.relpath(spec["vae"], context.folder)}


def _spec(config: GenerateConfig, context: StageContext, request: Request, folder: Path) -> dict[str, Any]:
    from scldm.checkpoints.native import folder_digest

    vae, flow = context.inputs["train_vae"], context.inputs["train_flow"]
    own = flow.facts.get("vae")  # of a flow that was trained with its VAE
    decoder = vae.path("model") if own is None else Path(flow.folder) / own[config.sampler.weights]
    provenance = {
        "schema_version": SCHEMA_VERSION,
        "vae": folder_digest(decoder),
        "flow": folder_digest(flow.path("model")),
        "sampler": config.sampler.model_dump_json(),
        "seed": config.seed,
        "request": request.digest,
        "data": str(context.inputs["ingest"].facts["digest"]),
        "latent_shape": list(vae.facts["latent_shape"]),
    }
    return {
        "folder": str(folder),
        "vae": str(decoder),
        "flow": str(flow.path("model")),
        "sampler": config.sampler.model_dump(mode="json"),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "threads": threads_per_worker(context.resources),
        "latent_shape": list(vae.facts["latent_shape"]),
        "prefix": hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:8],
        "digits": len(str(max(1, request.n_cells - 1))),
        "provenance": provenance,
    }


def _generated(
    todo: list[int], request: Request, config: GenerateConfig, spec: dict[str, Any], context: StageContext
) -> Iterator[dict[str, Any]]:
    """Records of the shards to do, as they are committed."""
    if not todo:
        return
    import ray.data
    from ray.data import ActorPoolStrategy

    rows = []
    for k in todo:
        start, stop = k * config.shard_size, min((k + 1) * config.shard_size, request.n_cells)
        rows.append({"shard": k, "start": start, "blocks": json.dumps(request.slice(start, stop))})
    resources = context.resources
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Generator,
        fn_constructor_args=(spec,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=min(resources.actors, len(rows))),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker or None,
    )
    yield from dataset.iter_rows()


def _committed(root: Path, folder: Path) -> list[dict[str, Any]]:
    """Shards of an earlier attempt that still are what their record says."""
    records = []
    for path in folder.glob("part-*.h5ad.json"):
        record = json.loads(path.read_text())
        shard = root / record["file"]
        if shard.is_file():
            with shard.open("rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() == record["sha256"]:
                    records.append(record)
    return records
