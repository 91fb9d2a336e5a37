"""Generate cells: flow, decoder, draw of counts (of log1p CP10k values, for a Gaussian head).

A cell is a function of (models, sampler, seed, request, cell id, precision, kind of device).

Noise, library size and counts of a cell come from its own counters (`counter_random`). The networks' rounding depends
on the shape of a batch, so the networks only see *tiles*: all cells whose ids have the same quotient by the tile size,
each always at the same position. Shards, batches, actors and retries therefore change no bit of a cell. The size of a
tile follows from the models and the kind of device alone. Other processors, GPUs or numbers of threads round
differently.

Shape letters: b cells, g genes, p genes that are written, m latent tokens, e latent width, r rows of the request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.flow.config import SamplerConfig
from scldm.flow.distilled import sample_distilled, sampler_problems, whole_flow_problem
from scldm.flow.sampler import sample_latents
from scldm.flow.transport import generation_start_problem, sample_through_controls
from scldm.generation.counter_random import normals
from scldm.generation.decoder_condition import decoder_vectors
from scldm.generation.expression_draw import draw_expression, stored_whole
from scldm.generation.nb_draw import draw_counts
from scldm.generation.pair import pair_problems
from scldm.nn.vae import CountDistribution

LATENT, LIBRARY, COUNTS = 11, 12, 13  # streams of a cell's randomness
CPU_TILE, GPU_TILE = 32, 1024  # cells
GPU_DECODE_BYTES = 2**30  # bytes of the decoder's fp32 outputs for a tile


@dataclass(frozen=True)
class Recipe:
    """The numbers of each row of a request; cell ids count over the rows."""

    stops: np.ndarray  # (r,) int64: a row's cells have ids below its stop and not below the stop before
    conditions: Mapping[str, np.ndarray]  # label -> class ids (r,), the null id if no class is requested
    scale: Mapping[str, np.ndarray]  # label (or JOINT) -> guidance scale (r,)
    log_mean: np.ndarray  # (r,) of log(library size)
    log_sd: np.ndarray  # (r,); 0: the same library size for all cells of the row
    decoder_condition: np.ndarray | None = None  # (r, d) of an adaLN decoder

    @property
    def n_cells(self) -> int:
        """Number of cells of all rows."""
        return int(self.stops[-1]) if len(self.stops) else 0

    def rows(self, cell_ids: np.ndarray) -> np.ndarray:
        """Return the row of each cell; ids past the end belong to the last row (they only fill a tile)."""
        return np.minimum(np.searchsorted(self.stops, cell_ids, side="right"), len(self.stops) - 1)


@dataclass(frozen=True)
class GeneratedCells:
    """Cells of a batch, with the values of the genes to write."""

    cell_ids: np.ndarray  # (b,) int64
    values: sp.csr_matrix  # (b, p) int32 counts; float32 log1p CP10k of a Gaussian head
    latents: np.ndarray  # (b, m * e) float32
    library_size: np.ndarray  # (b,) float32: input of the decoder


@dataclass(frozen=True)
class DecodedTile:
    """Decoded cells of a tile before values are drawn: dense and short-lived."""

    cell_ids: np.ndarray  # (b,)
    mu: np.ndarray  # (b, g) float32
    theta: np.ndarray | None  # (g,) or (b, g) float32; None: a Gaussian head
    latents: np.ndarray  # (b, m * e) float32
    library_size: np.ndarray  # (b,) float32


def check_pair(vae: LoadedVAE, flow: LoadedFlow) -> None:
    """Check that a flow and a VAE belong together.

    Raises:
        ValueError: Their latents or vocabularies differ.
    """
    config = vae.vae.config
    if problems := pair_problems(
        vae_latents=(config.n_latent_tokens, config.latent_width),
        flow_latents=(flow.n_latent_tokens, flow.latent_width),
        vae=vae.vocabulary,
        flow=flow.vocabulary,
    ):
        raise ValueError("; ".join(problems))


def tile_cells(vae: LoadedVAE, device: torch.device) -> int:
    """Return the cells of a tile: a power of two that depends on the model and the kind of device, not on free
    memory."""
    if device.type == "cpu":
        return CPU_TILE
    outputs = 2 if vae.vae.config.head == "nb_cell" else 1
    tile = GPU_TILE
    while tile > CPU_TILE and tile * vae.vae.n_genes * 4 * (outputs + 3) > GPU_DECODE_BYTES:
        tile //= 2
    return tile


def distilled_problems(flow: LoadedFlow, sampler: SamplerConfig, start: Literal["noise", "control"]) -> list[str]:
    """Return what a distilled flow is asked for that it cannot do; nothing for other flows."""
    if flow.distilled is None:
        return []
    by_way = whole_flow_problem(flow.distilled, "start (control)") if start == "control" else None
    return [*([] if by_way is None else [by_way]), *sampler_problems(flow.distilled, sampler)]


class CellMaker:
    """Generates any cells of a request from both models, a recipe and a seed.

    Args:
        genes: Ids of the genes to write, increasing; None: all. The softmax runs over all genes either way.
        pool: Threads that draw counts.
        start: control makes control cells from noise and carries them to their labels, by a flow with both fields.

    Raises:
        ValueError: VAE and flow do not belong together, the flow has no such start, or it was distilled and cannot
            honour the sampler.
    """

    def __init__(
        self,
        vae: LoadedVAE,
        flow: LoadedFlow,
        recipe: Recipe,
        *,
        sampler: SamplerConfig,
        seed: int,
        genes: np.ndarray | None = None,
        pool: ThreadPoolExecutor | None = None,
        start: Literal["noise", "control"] = "noise",
    ):
        check_pair(vae, flow)
        if problem := generation_start_problem(flow.start, start):
            raise ValueError(problem)
        if flow.distilled is not None and (problems := distilled_problems(flow, sampler, start)):
            raise ValueError("; ".join(problems))
        decoder_vectors(vae.vae.config, recipe.decoder_condition, len(recipe.stops), per="each row of the request")
        self.vae, self.flow, self.recipe, self.sampler = vae, flow, recipe, sampler
        self.seed, self.genes, self.pool, self.start = seed, genes, pool, start
        self.device = next(vae.vae.parameters()).device
        self.tile = tile_cells(vae, self.device)

    def cells(self, start: int, stop: int) -> Iterator[GeneratedCells]:
        """Yield the cells with ids start .. stop - 1, a tile or less at a time."""
        for decoded in self.decoded(start, stop):
            yield self.drawn(decoded)

    def tile_of(self, first: int) -> GeneratedCells:
        """Return the cells of the request that a whole tile holds, by the id of its first cell."""
        [cells] = self.cells(first, min(first + self.tile, self.recipe.n_cells))
        return cells

    def decoded(self, start: int, stop: int) -> Iterator[DecodedTile]:
        """Yield the same cells before counts are drawn: everything that needs the networks."""
        for first in range(start - start % self.tile, stop, self.tile):
            ids = np.arange(first, first + self.tile, dtype=np.int64)
            z = self.latents(ids)
            yield self.decode(ids, z, slice(max(start - first, 0), min(stop - first, self.tile)))

    @torch.inference_mode()
    def latents(self, ids: np.ndarray) -> Tensor:
        """Sample the latents of a whole tile, (b, m, e)."""
        rows = self.recipe.rows(ids)
        shape = (self.flow.n_latent_tokens, self.flow.latent_width)
        noise = torch.from_numpy(normals(ids, shape[0] * shape[1], seed=self.seed, stream=LATENT)).unflatten(1, shape)
        conditions = {k: torch.as_tensor(v[rows], device=self.device) for k, v in self.recipe.conditions.items()}
        scale = {k: torch.as_tensor(v[rows], device=self.device) for k, v in self.recipe.scale.items()}
        x0 = noise.to(self.device)
        if self.flow.distilled is not None:  # its guidance is in its weights
            return sample_distilled(self.flow.dit, x0, conditions, self.flow.distilled, self.flow.path)
        if self.start == "control" and self.flow.start is not None:
            label = self.flow.start.label
            [control] = self.flow.vocabulary.label(label).encode([self.flow.start.control]).tolist()
            return sample_through_controls(
                self.flow.dit, x0, conditions, self.sampler, self.flow.path, label=label, control=control, scale=scale
            )
        return sample_latents(self.flow.dit, x0, conditions, self.sampler, self.flow.path, scale=scale or None)

    @torch.inference_mode()
    def decode(self, ids: np.ndarray, z: Tensor, kept: slice) -> DecodedTile:
        """Decode a tile to means and dispersions; returns the cells of `kept`."""
        size = self.library_sizes(ids)
        condition = self.recipe.decoder_condition
        if condition is not None:
            condition = torch.from_numpy(condition[self.recipe.rows(ids)]).to(self.device)
        decoded = self.vae.vae.decode(z, torch.from_numpy(size).to(self.device), condition=condition)
        mu, theta = decoded.mu[kept].cpu(), None
        if not torch.isfinite(mu).all():
            bad = ids[kept][~torch.isfinite(mu).all(1).numpy()].tolist()
            raise FloatingPointError(f"the decoder gave no finite means for cells {bad[:5]}; the model is not usable")
        if isinstance(decoded, CountDistribution):
            theta = decoded.theta / self.sampler.temperature
            theta = (theta if theta.ndim == 1 else theta[kept]).float().cpu().numpy()
        latents = z[kept].flatten(1).float().cpu().numpy()
        return DecodedTile(ids[kept], mu.float().numpy(), theta, latents, size[kept])

    def drawn(self, tile: DecodedTile) -> GeneratedCells:
        """Draw the values of decoded cells: counts, or expression of a Gaussian head."""
        if tile.theta is None:
            if self.sampler.expression == "mean":
                values = stored_whole(tile.mu if self.genes is None else tile.mu[:, self.genes])
            else:
                values = draw_expression(tile.mu, tile.cell_ids, seed=self.seed, stream=COUNTS, genes=self.genes)
            return GeneratedCells(tile.cell_ids, values, tile.latents, tile.library_size)
        counts = draw_counts(
            tile.mu, tile.theta, tile.cell_ids, seed=self.seed, stream=COUNTS, genes=self.genes, pool=self.pool
        )
        return GeneratedCells(tile.cell_ids, counts, tile.latents, tile.library_size)

    def library_sizes(self, ids: np.ndarray) -> np.ndarray:
        """Draw library sizes from the log-normal of each cell's row, rounded to integers of at least one, (b,)
        float32."""
        rows = self.recipe.rows(ids)
        z = normals(ids, 1, seed=self.seed, stream=LIBRARY)[:, 0].astype(np.float64)
        size = np.exp(self.recipe.log_mean[rows] + self.recipe.log_sd[rows] * z)
        return np.maximum(1.0, np.rint(size)).astype(np.float32)
