"""What trained models make of real cells: reconstructions, cells under another condition, likelihoods.

What is random of a cell is a function of (seed, stream, cell id), so that it does not matter beside which cells it is.

Shape letters: b cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from scldm.checkpoints.native import LoadedFlow
from scldm.flow.config import SamplerConfig
from scldm.flow.guidance import guided_velocity
from scldm.flow.likelihood import log_likelihood, rademacher
from scldm.flow.sampler import sample_latents, time_grid
from scldm.generation.counter_random import normals
from scldm.generation.nb_draw import draw_counts
from scldm.nn.vae import CountDistribution
from scldm.random import generator

NOISE, COUNTS, PROBE = 21, 22, 23  # streams of a cell's randomness; generated cells have others


def draw_sparse(decoded: CountDistribution, cell_ids: Sequence[int], *, seed: int) -> sp.csr_matrix:
    """Counts drawn from the decoder's negative binomial, (b, g) int32.

    Raises:
        FloatingPointError: means that are not finite, with the cells.
    """
    if not (finite := torch.isfinite(decoded.mu).all(1)).all():
        bad = np.asarray(cell_ids)[~finite.cpu().numpy()]
        raise FloatingPointError(
            f"the decoder gave no finite means for cells {bad[:5].tolist()}; the model is not usable"
        )
    mu, theta = decoded.mu.float().cpu().numpy(), decoded.theta.float().cpu().numpy()
    return draw_counts(mu, theta, np.asarray(cell_ids), seed=seed, stream=COUNTS)


def fresh_noise(flow: LoadedFlow, cell_ids: Sequence[int], *, seed: int) -> Tensor:
    """Noise of each cell, (b, m, e)."""
    shape = (flow.n_latent_tokens, flow.latent_width)
    flat = normals(np.asarray(cell_ids), shape[0] * shape[1], seed=seed, stream=NOISE)
    return torch.from_numpy(flat).unflatten(1, shape)


def to_noise(flow: LoadedFlow, z: Tensor, conditions: Mapping[str, Tensor], sampler: SamplerConfig) -> Tensor:
    """The noise that latents z (b, m, e) come from: the flow run backwards, under the cells' conditions, unguided.

    Guidance is left out because a guided flow has no noise of its own: it does not carry the noise to the data.
    """
    plain = sampler.model_copy(update={"guidance": 1.0})
    backwards = time_grid(plain, flow.path)[::-1]
    return sample_latents(flow.dit, z, conditions, plain, flow.path, backwards)


def under_condition(
    flow: LoadedFlow,
    z: Tensor,
    *,
    own: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    sampler: SamplerConfig,
) -> Tensor:
    """Latents (b, m, e) of the cells of z under other conditions: to noise under their own, and back under the target.

    Args:
        own: Label -> class ids (b,), the null id where a cell has none.
        target: The same, as wanted.
        sampler: Its guidance is of the way forwards.
    """
    return sample_latents(flow.dit, to_noise(flow, z, own, sampler), target, sampler, flow.path)


def latent_log_prob(
    flow: LoadedFlow,
    z: Tensor,
    conditions: Mapping[str, Tensor],
    cell_ids: Sequence[int],
    *,
    sampler: SamplerConfig,
    n_probes: int,
    seed: int,
) -> Tensor:
    """Log-likelihood of latents under the flow in nats, (b,): the mean over probes of the divergence.

    Latents are normalised per token, so they fill a surface and have no density of their own: compare cells and
    models of one latent shape by it, and read no absolute meaning into it.
    """
    velocity = guided_velocity(flow.dit, conditions, scale=1.0, path=flow.path, one_time=True)
    times = time_grid(sampler, flow.path)[::-1]
    total = torch.zeros(len(z), device=z.device)
    for k in range(n_probes):
        one = [rademacher(z.shape[1:], generator=generator(seed, PROBE, int(i), k), device=z.device) for i in cell_ids]
        total += log_likelihood(
            velocity, z, times, probe=torch.stack(one), solver=sampler.solver, rtol=sampler.rtol, atol=sampler.atol
        ).log_prob
    return total / n_probes
