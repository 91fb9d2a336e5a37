"""The actor that generates cells: it holds both models and commits one shard at a time.

A background thread draws, compresses and writes a tile of cells while the networks compute the next one. A shard that
was not committed is made again, to the same bytes (`pipeline.core.shards`).
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.config.job import GenerateConfig
from pipeline.core.faults import arm, fault_point
from pipeline.core.shards import CommitPoints, Record, ShardStore
from pipeline.inference.actors.numerics import agree
from pipeline.inference.background import BackgroundWriter
from pipeline.inference.cell_shards import CELLS, shard_name
from pipeline.inference.progress import ShardProgress, count_attempt
from pipeline.inference.request import recipe_of, settings_of
from pipeline.inference.shard_writer import ShardFile
from scldm.data.labels.reserved_names import PREDICTED_COLUMNS
from scldm.data.library_size import LibrarySizes
from scldm.generation.recipe import generated_obs, genes_table, named_after
from scldm.generation.request import Request

if TYPE_CHECKING:
    from scldm.generation.cell_maker import DecodedTile

logger = logging.getLogger(__name__)

DEFAULT_PENDING = 2  # tiles that wait for the background thread
MAX_WRITES = 3  # attempts at a shard whose file could not be written
WAIT_SECONDS = 2.0  # after the first failed write; doubles
POINTS = CommitPoints("generate.before_rename", "generate.before_record", "generate.after_record")


def cell_shards(folder: Path) -> ShardStore:
    """Return the store of generated shards, `<stage>/cells`; records name files from the stage's folder."""
    return ShardStore(folder, POINTS, prefix=CELLS)


@dataclass(frozen=True)
class GeneratorSpec:
    """What an actor needs to generate any shard of a request; picklable."""

    folder: Path  # of the shards; exists
    vae: Path  # model folder
    flow: Path  # model folder
    config: GenerateConfig
    request: Request
    genes: np.ndarray | None  # ids of the genes to write, increasing; None: all
    latent_shape: tuple[int, int]  # tokens, width
    threads: int  # of torch, and for drawing counts
    library_sizes: LibrarySizes
    prefix: str  # of obs names
    digits: int  # of the number in obs names
    provenance: dict[str, Any]  # uns["scldm"] of every shard
    run: str  # identifies this run of the job, for counting attempts
    fault: str  # faults to arm, see `pipeline.core.faults`
    decoder_condition: np.ndarray | None = None  # (r, d), vectors of an adaLN decoder for each row of the request
    predicted: np.ndarray | None = None  # (r, 3), predicted correlation of shifts of each row, and its interval


class Generator:
    """A Ray Data actor that generates shards; can be called without Ray, to the same effect."""

    def __init__(self, spec: GeneratorSpec):
        import torch

        from scldm.checkpoints.asked_values import with_values
        from scldm.checkpoints.native import load_flow, load_vae
        from scldm.generation.cell_maker import CellMaker
        from scldm.nn.kernels.precision import set_precision

        arm(spec.fault)
        torch.set_num_threads(spec.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.numerics = agree(
            spec.folder, spec.config.precision, device, where="generate.precision", solver=spec.config.sampler.solver
        )
        self.spec, self.config, self.store = spec, spec.config, cell_shards(spec.folder)
        self.prefix = named_after(spec.prefix, self.numerics.precision)
        vae = load_vae(spec.vae, device=device)
        flow = load_flow(spec.flow, weights=self.config.sampler.weights, device=device)
        for network in (vae.vae, flow.dit):
            set_precision(network, self.numerics.precision)
        flow = with_values(flow, (row.condition for row in spec.request.rows))
        self.vocabulary = flow.vocabulary
        self.draws_counts = vae.vae.config.head != "gaussian"
        recipe = recipe_of(
            spec.request, self.config, flow.vocabulary, spec.library_sizes, flow.dit.strategy, counts=self.draws_counts,
            distilled=flow.distilled,
        )  # fmt: skip
        recipe = replace(recipe, decoder_condition=spec.decoder_condition)
        self.genes = np.arange(flow.vocabulary.n_genes) if spec.genes is None else spec.genes
        pool = ThreadPoolExecutor(spec.threads) if spec.threads > 1 else None
        self.maker = CellMaker(
            vae,
            flow,
            recipe,
            sampler=self.config.sampler,
            seed=self.config.seed,
            genes=spec.genes,
            pool=pool,
            start=self.config.start,
        )
        batch = self.config.batch_size
        self.max_pending = DEFAULT_PENDING if batch is None else max(1, -(-batch // self.maker.tile))

    def __call__(self, shards: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self.make(row["shard"]) for row in shards.to_pylist()])

    def make(self, shard: int) -> Record:
        """Generate and commit a shard; return its record. A write that fails is tried again.

        Raises:
            FloatingPointError: the model gave no finite numbers; a second attempt would give the same.
            OSError: the shard could not be written.
        """
        count_attempt(self.spec.folder, shard, self.spec.run)
        attempt = 1
        while True:
            try:
                return self.store.commit(
                    shard_name(shard),
                    lambda path: {"shard": shard, "n_cells": self._write(path, shard), **self.numerics.as_plain()},
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"shard {shard}: {error}") from error
            except OSError as error:
                if attempt == MAX_WRITES:
                    raise OSError(f"shard {shard} could not be written in {MAX_WRITES} attempts: {error}") from error
                wait = WAIT_SECONDS * 2 ** (attempt - 1)
                logger.warning("shard %d: %s; next attempt in %.0f s", shard, error, wait)
                time.sleep(wait)
                attempt += 1

    def _write(self, path: Path, shard: int) -> int:
        """Write the file of a shard; return the number of its cells."""
        start = shard * self.config.shard_size
        stop = min(start + self.config.shard_size, self.spec.request.n_cells)
        latent_width = self.spec.latent_shape[0] * self.spec.latent_shape[1]
        sizes: list[np.ndarray] = []
        progress = ShardProgress(self.spec.folder, shard)

        def add(tile: DecodedTile) -> None:
            cells = self.maker.drawn(tile)
            out.add(cells.values, cells.latents)
            sizes.append(cells.library_size)
            progress.add(len(cells.cell_ids))
            fault_point("generate.after_batch")

        dtype = np.int32 if self.draws_counts else np.float32
        with progress, ShardFile(path, n_genes=len(self.genes), latent_width=latent_width, dtype=dtype) as out:
            with BackgroundWriter(self.max_pending) as writer:
                for tile in self.maker.decoded(start, stop):
                    writer.submit(add, tile)
            ids = np.arange(start, stop, dtype=np.int64)
            library = np.concatenate([np.zeros(0, np.float32), *sizes])
            out.finish(
                self._obs(ids, library, out, shard),
                genes_table(self.vocabulary, self.genes),
                {"scldm": {**self.spec.provenance, **self.numerics.as_plain()}},
            )
        return len(ids)

    def _obs(self, ids: np.ndarray, library: np.ndarray, out: ShardFile, shard: int) -> pd.DataFrame:
        """Return obs by the AnnData contract of generated cells (docs/generated_cells.md)."""
        names = [f"{self.prefix}-{i:0{self.spec.digits}d}" for i in ids.tolist()]
        settings = settings_of(self.config)
        obs = generated_obs(ids, names, self.maker.recipe, self.spec.request, settings, self.vocabulary)
        obs.insert(obs.columns.get_loc("gen_index"), "gen_shard", np.int32(shard))
        if self.spec.predicted is not None:
            of_cells = self.spec.predicted[self.maker.recipe.rows(ids)].astype(np.float32)
            obs = obs.assign(**dict(zip(PREDICTED_COLUMNS, of_cells.T, strict=True)))
        if not self.draws_counts:
            return obs
        obs["library_size"] = library
        obs["total_counts"] = out.total_counts.astype(np.int64)
        obs["n_genes"] = out.n_expressed.astype(np.int32)
        return obs
