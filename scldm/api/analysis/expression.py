"""Denoised expression: what the decoder expects of real cells, at a library size of the reader's choice.

Shape letters: b cells, g genes, p genes that are kept, m latent tokens, e latent width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import anndata
import numpy as np
import torch
from torch import Tensor

from scldm.api.arguments import Arguments
from scldm.api.conditions import kept_genes
from scldm.api.parts import LATENTS, each_batch, flat, joined
from scldm.checkpoints.native import LoadedVAE
from scldm.data.align import AlignedCells
from scldm.data.batch import CellBatch
from scldm.data.vocabulary import Vocabulary
from scldm.generation.cell_maker import tile_cells
from scldm.generation.recipe import genes_table
from scldm.generation.request_table import RequestError

LIBRARY, OBSERVED = 1e4, "observed"


def read_library_size(given: Arguments, value: Any, *, gaussian: bool) -> float | None:
    """Return a library size; None: that of each cell.

    Args:
        given: Arguments of the call, to which problems are added.
        gaussian: Whether the head is Gaussian, whose mean of log1p CP10k has no library size.
    """
    if isinstance(value, str) and value == OBSERVED:
        size = None
    else:
        size = given.number("library_size", value, above=0.0, or_text="'observed' or ")
    if gaussian and size != LIBRARY:
        given.problems.append(
            f"library_size must be {LIBRARY:g}: the model has a gaussian head, whose mean is of log1p(counts per "
            f"10,000) and follows no other library size; got {value!r}"
        )
    return size


def read_only_genes(given: Arguments, names: Any, vocabulary: Vocabulary) -> np.ndarray | None:
    """Return the ids of the genes to keep, increasing; None: all. Problems are added to `given`."""
    try:
        return kept_genes(given, names, vocabulary, argument="only_genes")
    except RequestError as error:
        given.problems.append(str(error).replace("generate.genes: ", "only_genes: "))
        return None


def check_dense_fits(n_cells: int, n_genes: int, *, memory: int | None = None) -> None:
    """Raise RequestError if dense float32 expression cannot be held by this machine, before any cell is decoded.

    Args:
        memory: Bytes of the machine; None asks it.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if memory is None else memory
    needed = 4 * n_cells * n_genes
    if needed > memory:
        raise RequestError(
            f"denoised expression of {n_cells:,} cells and {n_genes:,} genes is dense and takes {needed / 2**30:,.0f} "
            f"GiB; this machine has {memory / 2**30:,.0f}. Name the genes to keep, only_genes=[…] (at most "
            f"{memory // (8 * max(n_cells, 1)):,}), or pass fewer cells at a time"
        )


def decoded_tiles(
    vae: LoadedVAE, cells: AlignedCells, adata: anndata.AnnData, library_size: float | None,
    vectors: np.ndarray | None = None,
) -> Iterator[tuple[Tensor, np.ndarray]]:  # fmt: skip
    """Yield latents (b, m, e) and means (b, g) float32 of tiles of cells, in order.

    Args:
        library_size: That the means sum to; None: the cell's own.
        vectors: Condition vectors of an adaLN decoder, (b, d).
    """

    @torch.inference_mode()
    def decoded(batch: CellBatch) -> tuple[Tensor, np.ndarray]:
        z = vae.vae.encode(batch)
        size = batch.library_size if library_size is None else torch.full_like(batch.library_size, library_size)
        condition = None if vectors is None else torch.from_numpy(vectors[batch.joinids.cpu().numpy()]).to(z.device)
        return z, vae.vae.decode(z, size, condition=condition).mu.float().cpu().numpy()

    return each_batch(decoded, vae, None, cells, adata)


@torch.inference_mode()
def decoded_latents(vae: LoadedVAE, latents: np.ndarray, library_size: float) -> Iterator[np.ndarray]:
    """Yield the means (b, g) float32 of tiles of latents (n, m * e), in order."""
    shape = vae.vae.config.n_latent_tokens, vae.vae.config.latent_width
    device = next(vae.vae.parameters()).device
    for part in torch.from_numpy(latents).split(tile_cells(vae, device)):
        z = part.unflatten(1, shape).to(device)
        yield vae.vae.decode(z, torch.full((len(z),), library_size, device=device)).mu.float().cpu().numpy()


def normalized(
    adata: anndata.AnnData, cells: AlignedCells, *, vae: LoadedVAE, library_size: float | None,
    kept: np.ndarray | None, vectors: np.ndarray | None, about: Mapping[str, Any],
) -> anndata.AnnData:  # fmt: skip
    """Return the denoised expression of cells: X dense float32 (b, p), with their obs and latents.

    Args:
        cells: The cells' counts over the genes of the model.
        kept: Ids of the genes to keep; None: all. Only these are stored.
        about: Provenance, for uns["scldm"].
    """
    var = genes_table(vae.vocabulary, kept)
    check_dense_fits(adata.n_obs, len(var))
    x, latents = np.empty((adata.n_obs, len(var)), dtype=np.float32), []
    start = 0
    for z, mu in decoded_tiles(vae, cells, adata, library_size, vectors):
        x[start : start + len(mu)] = mu if kept is None else mu[:, kept]
        latents.append(flat(z))
        start += len(mu)
    if not np.isfinite(x).all():
        raise FloatingPointError("the decoder gave no finite means; the model is not usable")
    gaussian = vae.vae.config.head == "gaussian"
    size = OBSERVED if library_size is None else library_size
    scale = {"scale": "mean of log1p CP10k"} if gaussian else {"scale": "mean counts", "library_size": size}
    shape = vae.vae.config.n_latent_tokens, vae.vae.config.latent_width
    return anndata.AnnData(
        x, obs=adata.obs.copy(), var=var, obsm={LATENTS: joined(latents, shape)}, uns={"scldm": {**about, **scale}}
    )
