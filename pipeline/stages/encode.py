"""Encode every cell once: the latent cache.

The VAE is frozen and deterministic, so the flow can be trained on latents and never reads a count. Blocks are read in
storage order through Ray Data; actors that hold the VAE commit one Arrow IPC shard for each block. Without Ray
(`resources.ray=false`) one child process does both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.cluster.child import in_child
from pipeline.config.context import StageContext
from pipeline.config.job import EncodeConfig
from pipeline.config.resources import threads_per_worker
from pipeline.core.faults import VARIABLE, arm
from pipeline.core.progress import ProgressReader, ProgressWriter
from pipeline.core.shards import CommitPoints, Record, ShardStore
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.loading.blocks import LABEL, RECORD_BATCH_ROWS, BlockSource, storage_blocks
from pipeline.inference.actors.numerics import agree, begin, end
from pipeline.inference.actors.pool import actor_pool
from scldm.nn.kernels.precision import Precision

BLOCK_ROWS = 8192
POINTS = CommitPoints("encode.before_rename", "encode.before_record", "encode.after_record")


@dataclass(frozen=True)
class EncoderSpec:
    """What an actor needs to encode any block; picklable."""

    model: Path  # model folder of the VAE
    folder: Path  # of the shards; exists
    labels: tuple[str, ...]
    batch_size: int  # cells that the VAE encodes at a time
    threads: int  # of torch
    fault: str  # faults to arm, see `pipeline.core.faults`
    precision: Precision | None = None  # None: by device
    latents: Literal["float32", "float16"] = "float32"  # type of the latents on disk


class Encoder:
    """A Ray Data actor: tables of cells in, records of committed latent shards out."""

    def __init__(self, spec: EncoderSpec):
        import torch

        from scldm.checkpoints.native import load_vae
        from scldm.nn.kernels.precision import set_precision

        arm(spec.fault)
        torch.set_num_threads(spec.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.numerics = agree(spec.folder, spec.precision, self.device, where="encode.precision")
        self.vae = load_vae(spec.model, device=self.device).vae
        set_precision(self.vae, self.numerics.precision)
        self.spec, self.store = spec, ShardStore(spec.folder, POINTS)

    def __call__(self, cells: pa.Table) -> pa.Table:
        split = cells["split"][0].as_py()
        latents = self._latents(cells)

        def write(path: Path) -> dict[str, Any]:
            with pa.ipc.new_file(path, latents.schema) as writer:
                writer.write_table(latents, max_chunksize=RECORD_BATCH_ROWS)
            return {"split": split, "n_cells": len(cells), **self.numerics.as_plain()}

        record = self.store.commit(shard_name(split, cells["shard"][0].as_py()), write)
        return pa.Table.from_pylist([record])

    def _latents(self, cells: pa.Table) -> pa.Table:
        size = self.spec.batch_size
        z = np.concatenate([self._encode(cells.slice(i, size)) for i in range(0, len(cells), size)])
        return pa.table({
            "soma_joinid": cells["soma_joinid"],
            **{LABEL + name: cells[LABEL + name] for name in self.spec.labels},
            "log_library_size": pa.array(np.log(cells["library_size"].to_numpy())),
            "latent": pa.FixedSizeListArray.from_arrays(pa.array(z.reshape(-1)), z.shape[1]),
        })  # fmt: skip

    def _encode(self, cells: pa.Table) -> np.ndarray:
        import torch

        from pipeline.data.loading.collate import to_cell_batch

        with torch.inference_mode():
            z = self.vae.encode(to_cell_batch(cells.combine_chunks(), self.spec.labels).to(self.device))
        return z.flatten(1).float().cpu().numpy().astype(self.spec.latents)


def shard_name(split: str, shard: int) -> str:
    return f"{split}-{shard:05d}.arrow"


def run(config: EncodeConfig, context: StageContext) -> dict[str, Any]:
    """Run the stage.

    Returns:
        Facts: latents (folder), latent_type, shards (split -> files with cells and sha256), latent_shape, n_cells,
        precision, device (kind).
    """
    data = IngestedDataset.open(context.inputs["ingest"])
    vae = context.inputs["train_vae"]
    folder = context.folder / "latents"
    folder.mkdir(exist_ok=True)
    store = ShardStore(folder, POINTS)
    store.remove_abandoned()  # of killed actors; an actor of a dead driver that still runs then fails to rename
    records = store.committed()
    begin(folder, records, gpus=context.resources.gpus_per_worker)
    spec = EncoderSpec(
        model=vae.path("model"), folder=folder, labels=tuple(x.name for x in data.vocabulary.labels),
        batch_size=config.batch_size, threads=threads_per_worker(context.resources),
        fault=os.environ.get(VARIABLE, ""), precision=config.precision, latents=config.latents,
    )  # fmt: skip
    total = sum(data.n_cells[split] for split in config.splits)
    progress = ProgressWriter(context.folder)
    done = sum(r["n_cells"] for r in records)
    with ProgressReader(context.folder, "encode"):
        for split in config.splits:
            source = data.blocks(split)
            blocks = storage_blocks(source, BLOCK_ROWS)
            have = {r["file"] for r in records}
            todo = [i for i in range(len(blocks)) if shard_name(split, i) not in have]
            if not todo:
                continue
            for record in _encode_blocks(source, {i: blocks[i] for i in todo}, split, spec, context):
                records.append(record)
                done += record["n_cells"]
                progress.update(done, total)
    shards = {s: sorted((r for r in records if r["split"] == s), key=lambda r: r["file"]) for s in config.splits}
    n_cells = {s: sum(r["n_cells"] for r in rows) for s, rows in shards.items()}
    context.tracker.metrics({f"encode/{s}_cells": float(n) for s, n in n_cells.items()}, step=0)
    about = {"latents": "latents", "latent_type": config.latents, "latent_shape": vae.facts["latent_shape"]}
    return {**about, "shards": shards, "n_cells": n_cells} | end(folder, records)


def _encode_blocks(
    source: BlockSource, blocks: dict[int, np.ndarray], split: str, spec: EncoderSpec, context: StageContext
) -> Iterator[Record]:
    """Yield the records of shards as they are committed, by Ray's actors or by one in a child process.

    Args:
        blocks: Number of a shard -> the soma_joinids of its cells.
    """
    resources = context.resources
    if not resources.ray:
        arguments = (spec, source, blocks, split)
        yield from in_child(_one_after_another, *arguments, resources=resources, folder=context.folder)
        return
    from pipeline.data.loading.ray_source import blocks_dataset

    shard_of = {int(ids[0]): shard for shard, ids in blocks.items()}
    named = blocks_dataset(source, list(blocks.values())).map_batches(
        lambda cells: _named(cells, split, shard_of[int(cells["soma_joinid"][0].as_py())]),
        batch_size=None, batch_format="pyarrow", num_cpus=0.25,
    )  # fmt: skip
    committed = named.map_batches(
        Encoder,
        fn_constructor_args=(spec,),
        batch_size=None,
        batch_format="pyarrow",
        compute=actor_pool(resources, len(shard_of)),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker or None,
    )
    yield from committed.iter_rows()


def _one_after_another(
    spec: EncoderSpec, source: BlockSource, blocks: dict[int, np.ndarray], split: str
) -> Iterator[Record]:
    encoder = Encoder(spec)
    for shard, ids in blocks.items():
        yield from encoder(_named(source.reader.read(source.rows(ids)), split, shard)).to_pylist()


def _named(cells: pa.Table, split: str, shard: int) -> pa.Table:
    """Add the split and the number of the shard that cells belong to."""
    cells = cells.append_column("split", pa.array([split] * len(cells)))
    return cells.append_column("shard", pa.array(np.full(len(cells), shard, np.int32)))
