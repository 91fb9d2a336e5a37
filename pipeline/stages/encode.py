"""Encode every cell once: the latent cache.

The VAE is frozen and deterministic, so the flow can be trained on latents and never touches a count. Blocks are read in
storage order through Ray Data; actors that hold the VAE write one Arrow IPC shard for each block, by rename.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config.job import EncodeConfig
from pipeline.config.resources import threads_per_worker
from pipeline.core.faults import VARIABLE, arm, fault_point
from pipeline.core.files import write_json_atomic
from pipeline.core.manifest import StageContext
from pipeline.core.progress import ProgressReader, ProgressWriter
from pipeline.data.ingest.dataset import Ingested
from pipeline.data.loading.blocks import LABEL, RECORD_BATCH_ROWS
from pipeline.inference.shard_pool import actor_pool, committed

BLOCK_ROWS = 8192


class Encoder:
    """A Ray Data actor: tables of cells in, shards of latents out."""

    def __init__(self, model: str, folder: str, labels: Sequence[str], batch_size: int, threads: int, fault: str):
        import torch

        from scldm.checkpoints.native import load_vae

        arm(fault)
        torch.set_num_threads(threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.vae = load_vae(Path(model), device=self.device).vae
        self.folder, self.labels, self.batch_size = Path(folder), list(labels), batch_size

    def __call__(self, cells: pa.Table) -> pa.Table:
        split = cells["split"][0].as_py()
        file = f"{split}-{cells['shard'][0].as_py():05d}.arrow"
        self._write(self.folder / file, cells)
        fault_point("encode.before_record")
        with (self.folder / file).open("rb") as f:
            record = {"split": split, "file": file, "n_cells": len(cells), "sha256": _sha256(f)}
        # The shard's own record, so that a run that was killed knows what is done.
        write_json_atomic(self.folder / f"{file}.json", record)
        fault_point("encode.after_record")
        return pa.Table.from_pylist([record])

    def _write(self, path: Path, cells: pa.Table) -> None:
        latents = [self._encode(cells.slice(i, self.batch_size)) for i in range(0, len(cells), self.batch_size)]
        z = np.concatenate(latents)
        columns = {
            "soma_joinid": cells["soma_joinid"],
            **{LABEL + name: cells[LABEL + name] for name in self.labels},
            "log_library_size": pa.array(np.log(cells["library_size"].to_numpy())),
            "latent": pa.FixedSizeListArray.from_arrays(pa.array(z.reshape(-1)), z.shape[1]),
        }
        table = pa.table(columns)
        tmp = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        with pa.ipc.new_file(tmp, table.schema) as writer:
            writer.write_table(table, max_chunksize=RECORD_BATCH_ROWS)
        with tmp.open("rb") as f:
            os.fsync(f.fileno())
        fault_point("encode.before_rename")
        tmp.replace(path)

    def _encode(self, cells: pa.Table) -> np.ndarray:
        import torch

        from pipeline.data.loading.collate import to_cell_batch

        with torch.inference_mode():
            z = self.vae.encode(to_cell_batch(cells.combine_chunks(), self.labels).to(self.device))
        return z.flatten(1).float().cpu().numpy()


def run(config: EncodeConfig, context: StageContext) -> dict[str, Any]:
    """Facts: latents (folder), shards (split -> files with cells and sha256), latent_shape, n_cells."""
    from pipeline.data.loading.ray_source import blocks_dataset, storage_blocks

    data = Ingested.open(context.inputs["ingest"])
    vae = context.inputs["train_vae"]
    folder = context.folder / "latents"
    folder.mkdir(exist_ok=True)
    for unfinished in folder.glob(".*.tmp"):  # of actors that were killed; one that a dead driver left fails to rename
        unfinished.unlink(missing_ok=True)
    labels = [x.name for x in data.vocabulary.labels]
    records = committed(folder, folder, "*.arrow.json")
    total = sum(data.n_cells[split] for split in config.splits)
    progress = ProgressWriter(context.folder)
    done = sum(r["n_cells"] for r in records)
    with ProgressReader(context.folder, "encode"):
        for split in config.splits:
            source = data.blocks(split)
            blocks = storage_blocks(source, BLOCK_ROWS)
            have = {r["file"] for r in records}
            todo = [i for i in range(len(blocks)) if f"{split}-{i:05d}.arrow" not in have]
            if not todo:
                continue
            dataset = blocks_dataset(source, [blocks[i] for i in todo])
            shard_of = {int(blocks[i][0]): i for i in todo}
            for row in _encoded(dataset, split, shard_of, str(vae.path("model")), folder, labels, config, context):
                records.append(row)
                done += row["n_cells"]
                progress.update(done, total)
    shards = {s: sorted((r for r in records if r["split"] == s), key=lambda r: r["file"]) for s in config.splits}
    n_cells = {s: sum(r["n_cells"] for r in rows) for s, rows in shards.items()}
    context.tracker.metrics({f"encode/{s}_cells": float(n) for s, n in n_cells.items()}, step=0)
    return {"latents": "latents", "shards": shards, "latent_shape": vae.facts["latent_shape"], "n_cells": n_cells}


def _encoded(
    dataset: Any, split: str, shard_of: dict[int, int], model: str, folder: Path, labels: Sequence[str],
    config: EncodeConfig, context: StageContext,
) -> Any:  # fmt: skip
    """Records of the shards, as they are written."""

    resources = context.resources

    def name_shard(cells: pa.Table) -> pa.Table:
        shard = shard_of[int(cells["soma_joinid"][0].as_py())]
        cells = cells.append_column("split", pa.array([split] * len(cells)))
        return cells.append_column("shard", pa.array(np.full(len(cells), shard, np.int32)))

    named = dataset.map_batches(name_shard, batch_size=None, batch_format="pyarrow", num_cpus=0.25)
    threads = threads_per_worker(resources)
    written = named.map_batches(
        Encoder,
        fn_constructor_args=(model, str(folder), labels, config.batch_size, threads, os.environ.get(VARIABLE, "")),
        batch_size=None,
        batch_format="pyarrow",
        compute=actor_pool(resources, len(shard_of)),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker or None,
    )
    yield from written.iter_rows()


def _sha256(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()
