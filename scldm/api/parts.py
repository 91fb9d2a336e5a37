"""Shared by the methods of `scldm.Model`: tiles of real cells, and AnnData made from results.

Shape letters: b cells, m latent tokens, e latent width.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from scldm.api.folders import ModelFolders
from scldm.api.hub.download import commit_of
from scldm.checkpoints.native import LoadedFlow, LoadedVAE, folder_digest
from scldm.data.align import AlignedCells
from scldm.data.batch import CellBatch
from scldm.data.cell_counts import CellsError
from scldm.errors import CheckpointError
from scldm.generation.cell_maker import tile_cells
from scldm.generation.expression_draw import scale_of
from scldm.generation.recipe import genes_table
from scldm.generation.request_table import RequestError
from scldm.generation.tile_threads import each_tile

LATENTS = "X_scldm"
Result = TypeVar("Result")
OBS_BYTES = 200  # of a cell: its name and a row of obs


def tiles(
    vae: LoadedVAE, cells: AlignedCells, adata: anndata.AnnData, conditions: Mapping[str, np.ndarray] | None = None
) -> Iterator[CellBatch]:
    """Yield tiles of cells on the model's device, cut as in a job, so that results do not depend on the number of
    cells.

    Raises:
        CellsError: Cells express more genes than a model of upstream accepts.
    """
    most, lengths = vae.vae.config.genes_seq_len, np.diff(cells.counts.indptr)
    if most is not None and len(lengths) and lengths.max() > most:
        first = ", ".join(map(str, adata.obs_names[lengths > most][:3]))
        raise CellsError(
            f"{int((lengths > most).sum())} cells express more genes than the {most} that the model takes (first: "
            f"{first}); jobs/embed.yaml draws so many of them with max_genes={most}"
        )
    device = next(vae.vae.parameters()).device
    size = tile_cells(vae, device)
    for start in range(0, cells.counts.shape[0], size):
        yield cells.batch(start, start + size, conditions).to(device)


def each_batch(
    work: Callable[[CellBatch], Result], vae: LoadedVAE, flow: LoadedFlow | None, cells: AlignedCells,
    adata: anndata.AnnData, conditions: Mapping[str, np.ndarray] | None = None,
) -> Iterator[Result]:  # fmt: skip
    """Yield `work(batch)` for the tiles of cells, in order; small models compute several at once on a CPU.

    Raises:
        CellsError: As of `tiles`.
    """
    networks = (vae.vae, None if flow is None else flow.dit)
    return each_tile(work, tiles(vae, cells, adata, conditions), networks)


def latents_of(vae: LoadedVAE, cells: AlignedCells, adata: anndata.AnnData) -> np.ndarray:
    """Return the latents of cells, (b, m * e) float32.

    Raises:
        CellsError: As of `tiles`.
    """

    @torch.inference_mode()
    def encoded(batch: CellBatch) -> np.ndarray:
        return flat(vae.vae.encode(batch))

    shape = vae.vae.config.n_latent_tokens, vae.vae.config.latent_width
    return joined(list(each_batch(encoded, vae, None, cells, adata)), shape)


def check_fits(n_cells: int, *, n_latent_numbers: int, memory: int | None = None) -> None:
    """Raise RequestError if generated cells cannot be held by this machine, before any is made.

    Args:
        n_latent_numbers: m * e, of one cell.
        memory: Bytes of the machine; None asks it.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if memory is None else memory
    per_cell = 2 * 4 * n_latent_numbers + OBS_BYTES  # latents twice: while they are joined
    if n_cells * per_cell > memory:
        raise RequestError(
            f"{n_cells:,} cells take at least {n_cells * per_cell / 2**30:,.0f} GiB, without their counts, and this "
            f"machine has {memory / 2**30:,.0f}; ask for {memory // (2 * per_cell):,} cells or fewer, or write any "
            "number of them to files with a batch job: scldm run jobs/generate.yaml"
        )


def made_cells(
    vae: LoadedVAE, values: Sequence[sp.csr_matrix], latents: Sequence[np.ndarray], obs: pd.DataFrame,
    about: Mapping[str, Any], genes: np.ndarray | None = None, *, expression: str = "draw",
) -> anndata.AnnData:  # fmt: skip
    """Return cells that the model made as AnnData; adds total_counts and n_genes to obs if the model draws counts.

    Args:
        about: Provenance, for uns["scldm"].
        genes: Ids of the genes to keep; None: all.
        expression: Of a Gaussian head: whether the values are the mean or a draw.
    """
    var = genes_table(vae.vocabulary, genes)
    scale = scale_of(vae.vae.config.head, expression)
    x = sp.vstack([sp.csr_matrix((0, len(var)), dtype=np.float32 if scale else np.int32), *values], format="csr")
    if not scale:
        obs["total_counts"] = np.asarray(x.sum(1)).ravel().astype(np.int64)
        obs["n_genes"] = np.diff(x.indptr).astype(np.int32)
    shape = vae.vae.config.n_latent_tokens, vae.vae.config.latent_width
    return anndata.AnnData(
        x, obs=obs, var=var, obsm={LATENTS: joined(latents, shape)}, uns={"scldm": {**about, **scale}}
    )


def told(notes: list[str]) -> dict[str, list[str]]:
    """Warn of notes on a request, and return them as an entry of uns["scldm"]; nothing without notes."""
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return {"notes": notes} if notes else {}


def joined(parts: Sequence[np.ndarray], latent_shape: tuple[int, int]) -> np.ndarray:
    """Join latents of tiles to (b, m * e) float32, also of zero tiles."""
    return np.concatenate([np.zeros((0, latent_shape[0] * latent_shape[1]), np.float32), *parts])


def flat(z: Tensor) -> np.ndarray:
    """Return latents (b, m, e) as a float32 array (b, m * e) on the host."""
    return z.flatten(1).float().cpu().numpy()


def digests(folders: ModelFolders) -> dict[str, str]:
    """Return the hashes of the models, as the batch jobs record them."""
    found = {"vae": folder_digest(folders.vae)}
    return found if folders.flow is None else {**found, "flow": folder_digest(folders.flow)}


def source_of(folders: ModelFolders) -> dict[str, str]:
    """Return the name on the hub, with its commit, of models that came from there; nothing for others."""
    commit = commit_of(folders.vae)
    return {} if commit is None else {"source": commit}


def require_counts_head(vae: LoadedVAE, folders: ModelFolders) -> None:
    """Raise CheckpointError if the VAE has a Gaussian head, under which counts have no likelihood."""
    if vae.vae.config.head == "gaussian":
        raise CheckpointError(
            f"{folders.vae} has a gaussian head: it models log1p CP10k values, and counts have no likelihood under it"
        )
