"""Apply trained models to real cells: reconstructions, cells under another condition, likelihoods.

The randomness of a cell is a function of (seed, stream, cell id) and does not depend on other cells.

Shape letters: b cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from scldm.checkpoints.native import LoadedFlow
from scldm.errors import InputError
from scldm.flow.config import SamplerConfig
from scldm.flow.distilled import whole_flow_problem
from scldm.flow.guidance import guided_velocity
from scldm.flow.likelihood import log_likelihood, rademacher
from scldm.flow.sampler import sample_latents, time_grid
from scldm.generation.counter_random import normals
from scldm.generation.expression_draw import draw_expression
from scldm.generation.nb_draw import draw_counts
from scldm.nn.vae import CountDistribution, ExpressionDistribution
from scldm.random import generator

NOISE, COUNTS, PROBE = 21, 22, 23  # streams of a cell's randomness; generated cells have others


def draw_sparse(
    decoded: CountDistribution | ExpressionDistribution, cell_ids: Sequence[int], *, seed: int
) -> sp.csr_matrix:
    """Draw counts from the decoder's negative binomial, (b, g) int32; log1p CP10k values, float32, of a Gaussian head.

    Raises:
        FloatingPointError: Means are not finite; the cells are named.
    """
    if not (finite := torch.isfinite(decoded.mu).all(1)).all():
        bad = np.asarray(cell_ids)[~finite.cpu().numpy()]
        raise FloatingPointError(
            f"the decoder gave no finite means for cells {bad[:5].tolist()}; the model is not usable"
        )
    mu = decoded.mu.float().cpu().numpy()
    if isinstance(decoded, ExpressionDistribution):
        return draw_expression(mu, np.asarray(cell_ids), seed=seed, stream=COUNTS)
    theta = decoded.theta.float().cpu().numpy()
    return draw_counts(mu, theta, np.asarray(cell_ids), seed=seed, stream=COUNTS)


def require_whole_flow(flow: LoadedFlow, what: str) -> None:
    """Raise InputError if a flow was distilled: it is no velocity field.

    Args:
        what: What needs one, in words.
    """
    if problem := whole_flow_problem(flow.distilled, what):
        raise InputError(problem)


def fresh_noise(flow: LoadedFlow, cell_ids: Sequence[int], *, seed: int) -> Tensor:
    """Return new noise for each cell, (b, m, e)."""
    shape = (flow.n_latent_tokens, flow.latent_width)
    flat = normals(np.asarray(cell_ids), shape[0] * shape[1], seed=seed, stream=NOISE)
    return torch.from_numpy(flat).unflatten(1, shape)


def to_noise(flow: LoadedFlow, z: Tensor, conditions: Mapping[str, Tensor], sampler: SamplerConfig) -> Tensor:
    """Return the noise of latents z (b, m, e): integrate the flow backwards under the cells' conditions, unguided.

    There is no guidance, because a guided flow does not map the noise distribution to the data.
    """
    require_whole_flow(flow, "noise that latents come from")
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
    """Return latents (b, m, e) of the cells of z under other conditions: to noise under their own, back under the
    target.

    Args:
        own: Label -> class ids (b,), the null id if a cell has none.
        target: The same for the target conditions.
        sampler: Its guidance applies to the forward integration.
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
    """Return the log-likelihood of latents under the flow in nats, (b,), averaged over probes of the divergence.

    Latents are normalised per token, so they lie on a surface and have no density of their own. Use the values only to
    compare cells and models with the same latent shape.
    """
    require_whole_flow(flow, "a likelihood of latents")
    velocity = guided_velocity(flow.dit, conditions, scale=1.0, path=flow.path, one_time=True)
    times = time_grid(sampler, flow.path)[::-1]
    total = torch.zeros(len(z), device=z.device)
    for k in range(n_probes):
        one = [rademacher(z.shape[1:], generator=generator(seed, PROBE, int(i), k), device=z.device) for i in cell_ids]
        total += log_likelihood(
            velocity, z, times, probe=torch.stack(one), solver=sampler.solver, rtol=sampler.rtol, atol=sampler.atol
        ).log_prob
    return total / n_probes
