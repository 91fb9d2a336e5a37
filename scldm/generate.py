"""Cells from noise: flow, decoder, draw. A cell is a function of (models, sampler, seed, cell id, condition).

Noise, library size and counts of a cell come from generators of its own, so that batches, shards and retries do not
matter. (The networks' float rounding may depend on the batch size; a count changes only where a draw lies within that
rounding of a border.)

Shape letters: b cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch

from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.flow.config import SamplerConfig
from scldm.flow.sampler import sample_latents
from scldm.library_size import LogNormal
from scldm.nn.likelihood import draw_counts
from scldm.nn.vae import CountDistribution
from scldm.random import generator

LATENT, LIBRARY, COUNTS = 11, 12, 13  # streams of a cell's randomness


@dataclass(frozen=True)
class GeneratedCells:
    counts: sp.csr_matrix  # (b, g) int32
    latents: np.ndarray  # (b, m * e) float32
    library_size: np.ndarray  # (b,) float32: what was asked of the decoder


def check_pair(vae: LoadedVAE, flow: LoadedFlow) -> None:
    """A flow and a VAE that belong together.

    Raises:
        ValueError: their latents or vocabularies differ.
    """
    own = (vae.vae.config.n_latent_tokens, vae.vae.config.latent_width)
    if own != (flow.n_latent_tokens, flow.latent_width):
        raise ValueError(f"the VAE's latents are {own}, the flow's {(flow.n_latent_tokens, flow.latent_width)}")
    if vae.vae.config.head == "gaussian":
        raise ValueError(
            "the VAE's head is gaussian: it models log-normalised expression, and no counts can be drawn from it; "
            "train one with head nb_shared or nb_cell"
        )
    if vae.vocabulary.digest != flow.vocabulary.digest:
        raise ValueError("the VAE and the flow were trained with different vocabularies")


@torch.inference_mode()
def generate_cells(
    vae: LoadedVAE,
    flow: LoadedFlow,
    *,
    cell_ids: Sequence[int],
    conditions: Mapping[str, np.ndarray],
    library: Sequence[LogNormal],
    sampler: SamplerConfig,
    seed: int,
) -> GeneratedCells:
    """Generate a batch of cells.

    Args:
        cell_ids: What makes each cell's randomness its own, >= 0.
        conditions: Label -> class ids (b,); the null id where no label is asked for.
        library: Library-size statistics of each cell's condition.
        sampler: Solver, steps, guidance.
    """
    device = next(vae.vae.parameters()).device
    shape = (flow.n_latent_tokens, flow.latent_width)
    noise = torch.stack([torch.randn(shape, generator=generator(seed, LATENT, i)) for i in cell_ids])
    ids = {k: torch.as_tensor(v, device=device) for k, v in conditions.items()}
    z = sample_latents(flow.dit, noise.to(device), ids, sampler, flow.path)
    size = torch.tensor([_library_size(s, generator(seed, LIBRARY, i)) for s, i in zip(library, cell_ids, strict=True)])
    decoded = vae.vae.decode(z, size.to(device))
    assert isinstance(decoded, CountDistribution)  # check_pair refuses a Gaussian head
    mu, theta = decoded.mu.cpu(), decoded.theta.cpu()
    if not torch.isfinite(mu).all():
        bad = [int(i) for i in np.asarray(cell_ids)[~torch.isfinite(mu).all(1).numpy()]]
        raise FloatingPointError(f"the decoder gave no finite means for cells {bad[:5]}; the model is not usable")
    rows = []
    for row, i in enumerate(cell_ids):
        drawn = draw_counts(mu[row], theta if theta.ndim == 1 else theta[row], generator(seed, COUNTS, i))
        rows.append(sp.csr_matrix(drawn.to(torch.int32).numpy()[None]))
    return GeneratedCells(sp.vstack(rows, format="csr"), z.flatten(1).float().cpu().numpy(), size.numpy())


def _library_size(statistic: LogNormal, g: torch.Generator) -> float:
    """A draw from the log-normal, rounded to whole counts, at least one."""
    return max(1.0, round(float(np.exp(statistic.mean + statistic.sd * torch.randn((), generator=g).item()))))
