"""What makes one shard: an actor that holds both models.

The draw, the compression and the writing of a tile have a thread of their own, beside the networks of the next tile. A
shard is committed in three steps, and a process may die between any two of them: its file is written beside its name
and flushed, renamed, and recorded. A shard without a record is made again, to the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.config.job import GenerateConfig
from pipeline.core.faults import arm, fault_point
from pipeline.core.files import write_json_atomic
from pipeline.inference.background import Behind
from pipeline.inference.progress import ShardProgress, count_attempt
from pipeline.inference.recipe import recipe_of, settings_of
from pipeline.inference.request import Request
from pipeline.inference.shard_writer import ShardFile
from scldm.generation.recipe import generated_obs, genes_table

if TYPE_CHECKING:
    from scldm.generation.cell_maker import DecodedTile

DEFAULT_AHEAD = 2  # tiles
TRIES = 3  # of a shard whose file could not be written
WAIT_SECONDS = 2.0


def shard_name(shard: int) -> str:
    return f"part-{shard:05d}.h5ad"


class Generator:
    """A Ray Data actor; also called without Ray, with the same effect.

    Args:
        spec: Plain data (`pipeline.stages.generate`): folders of the models, settings, the whole request.
    """

    def __init__(self, spec: dict[str, Any]):
        import torch

        from scldm.checkpoints.native import load_flow, load_vae
        from scldm.generation.cell_maker import CellMaker

        arm(spec["fault"])
        torch.set_num_threads(spec["threads"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.spec, self.folder = spec, Path(spec["folder"])
        self.config = GenerateConfig.model_validate(spec["config"])
        self.request = Request.from_plain(spec["request"])
        vae = load_vae(Path(spec["vae"]), device=device)
        flow = load_flow(Path(spec["flow"]), weights=self.config.sampler.weights, device=device)
        self.vocabulary = flow.vocabulary
        recipe = recipe_of(self.request, self.config, flow.vocabulary, flow.library_sizes, flow.dit.strategy)
        genes = None if spec["genes"] is None else np.array(spec["genes"], dtype=np.int64)
        self.genes = np.arange(flow.vocabulary.n_genes) if genes is None else genes
        pool = ThreadPoolExecutor(spec["threads"]) if spec["threads"] > 1 else None
        self.maker = CellMaker(
            vae, flow, recipe, sampler=self.config.sampler, seed=self.config.seed, genes=genes, pool=pool
        )
        batch = self.config.batch_size
        self.ahead = DEFAULT_AHEAD if batch is None else max(1, -(-batch // self.maker.tile))

    def __call__(self, shards: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self.make(row["shard"]) for row in shards.to_pylist()])

    def make(self, shard: int) -> dict[str, Any]:
        """Write and commit a shard; its record. A write that fails is tried again."""
        count_attempt(self.folder, shard, self.spec["run"])
        for wait in (*(WAIT_SECONDS * 2**i for i in range(TRIES - 1)), None):
            try:
                return self._make(shard)
            except FloatingPointError as error:  # again it would be the same
                raise FloatingPointError(f"shard {shard}: {error}") from error
            except OSError as error:
                if wait is None:
                    raise OSError(f"shard {shard} could not be written in {TRIES} tries: {error}") from error
                print(f"shard {shard}: {error}; again in {wait:.0f} s", flush=True)
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _make(self, shard: int) -> dict[str, Any]:
        file = shard_name(shard)
        path = self.folder / file
        tmp = path.with_name(f".{file}.{os.getpid()}.tmp")
        n_cells = self._write(tmp, shard)
        with tmp.open("rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        fault_point("generate.before_rename")
        tmp.replace(path)
        fault_point("generate.before_record")
        record = {"shard": shard, "file": f"cells/{file}", "n_cells": n_cells, "sha256": sha256}
        write_json_atomic(self.folder / f"{file}.json", record)
        fault_point("generate.after_record")
        return record

    def _write(self, tmp: Path, shard: int) -> int:
        start = shard * self.config.shard_size
        stop = min(start + self.config.shard_size, self.request.n_cells)
        latent_width = self.spec["latent_shape"][0] * self.spec["latent_shape"][1]
        sizes: list[np.ndarray] = []
        progress = ShardProgress(self.folder, shard)

        def add(tile: DecodedTile) -> None:
            cells = self.maker.drawn(tile)
            out.add(cells.counts, cells.latents)
            sizes.append(cells.library_size)
            progress.add(len(cells.cell_ids))
            fault_point("generate.after_batch")

        with progress, ShardFile(tmp, n_genes=len(self.genes), latent_width=latent_width) as out:
            with Behind(self.ahead) as writer:
                for tile in self.maker.decoded(start, stop):
                    writer.do(add, tile)
            ids = np.arange(start, stop, dtype=np.int64)
            library = np.concatenate([np.zeros(0, np.float32), *sizes])
            out.finish(
                self._obs(ids, library, out, shard),
                genes_table(self.vocabulary, self.genes),
                {"scldm": self.spec["provenance"]},
            )
        return len(ids)

    def _obs(self, ids: np.ndarray, library: np.ndarray, out: ShardFile, shard: int) -> pd.DataFrame:
        """The AnnData contract of generated cells (README: "Ask for cells")."""
        width = self.spec["digits"]
        names = [f"{self.spec['prefix']}-{i:0{width}d}" for i in ids.tolist()]
        settings = settings_of(self.config)
        obs = generated_obs(ids, names, self.maker.recipe, self.request, settings, self.vocabulary)
        obs.insert(obs.columns.get_loc("gen_index"), "gen_shard", np.int32(shard))
        obs["library_size"] = library
        obs["total_counts"] = out.total_counts.astype(np.int64)
        obs["n_genes"] = out.n_expressed.astype(np.int32)
        return obs
