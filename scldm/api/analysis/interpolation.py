"""Cells between two cells, or between two conditions.

A straight line between latents leaves the region where cells are: latents are normalised per token, and a mean of two
cell types is no cell. The flow's noise is Gaussian, so that a path there is through cells of probable noise at every
place: **spherical**, x(s) = (sin((1 - s) a) x_0 + sin(s a) x_1) / sin(a) with a the angle between the two, because a
straight line of two independent noises is too short in its middle (by a factor of the square root of two).

Labels on the way: the velocity is (1 - s) v_a + s v_b, as guidance mixes two conditions. It is that of one label at
either end, and where both have the same labels it is theirs throughout. Between two conditions, the noise is the
same at all places, and only the velocity changes.

Shape letters: b pairs, m latent tokens, e latent width, g genes, s places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

from scldm.api.analysis.expression import check_dense_fits
from scldm.api.arguments import Arguments
from scldm.api.conditions import sampler_settings
from scldm.api.folders import Weights
from scldm.api.parts import each_batch, flat, made_cells
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.data.align import AlignedCells
from scldm.data.class_names import class_name
from scldm.data.vocabulary import UnknownNameError, Vocabulary
from scldm.flow.config import SamplerConfig
from scldm.flow.distilled import whole_flow_problem
from scldm.flow.guidance import guidance_terms, guided_velocity
from scldm.flow.sampler import time_grid
from scldm.flow.solvers import solve_ode
from scldm.generation.cell_maker import tile_cells
from scldm.generation.real_cells import draw_sparse, fresh_noise, to_noise
from scldm.generation.request_table import RequestError, check_guidance

SOLVER = {"solver": "midpoint", "steps": 20}  # as `Model.perturb`
MOST_PLACES = 10_000
PARALLEL = 1e-4  # radians: two noises this near have no angle to divide by


@dataclass(frozen=True)
class Way:
    """How ways are gone."""

    places: np.ndarray  # in 0 .. 1, increasing, (s,), both ends included
    sampler: SamplerConfig
    seed: int  # of counts, and of the noise between conditions


@dataclass(frozen=True)
class End:
    """Where paths begin or end: cells, or a condition under which they are made."""

    names: list[str]  # of b cells, or the condition b times
    conditions: Mapping[str, np.ndarray]  # label -> class ids (b,)
    cells: AlignedCells | None = None  # None: a condition
    adata: anndata.AnnData | None = None

    def repeated(self, n: int) -> End:
        """Return n times the one cell of an end."""
        if len(self.names) == n or self.cells is None or self.adata is None:
            return self
        rows = np.zeros(n, dtype=np.int64)
        cells = AlignedCells(self.cells.counts[rows], self.cells.n_missing, self.cells.n_extra)
        ids = {name: own[rows] for name, own in self.conditions.items()}
        return End([self.names[0]] * n, ids, cells, self.adata[rows])


def read_path(
    given: Arguments, n: Any, guidance: Any, sampler: Any, seed: Any, *, flow: LoadedFlow, weights: Weights
) -> Way:
    """Return how ways are gone; problems are added to `given`."""
    n, seed = given.whole("n", n, least=2, most=MOST_PLACES), given.seed(seed)
    settings = sampler_settings(given, SOLVER if sampler is None else sampler, guidance, loaded=weights)
    names = [x.name for x in flow.vocabulary.labels]
    given.problems += [p.replace("generate.sampler.", "") for p in check_guidance(settings.guidance, names)]
    if problem := whole_flow_problem(flow.distilled, "a way between cells"):
        given.problems.append(problem)
    if not given.problems:
        try:
            guidance_terms(names, settings.guidance, strategy=flow.dit.strategy)
        except ValueError as error:
            given.problems.append(str(error))
    return Way(np.linspace(0.0, 1.0, n), settings, seed)


def paired(a: End, b: End) -> tuple[End, End]:
    """Return two ends with as many cells each.

    Raises:
        RequestError: One is a condition and the other is not, or the numbers of cells do not fit.
    """
    if (a.cells is None) != (b.cells is None):
        raise RequestError(
            "a and b must both be cells, or both conditions; cells under another condition are model.perturb(cells, to)"
        )
    n = max(len(a.names), len(b.names))
    if {len(a.names), len(b.names)} - {1, n}:
        raise RequestError(
            f"a has {len(a.names):,} cells and b {len(b.names):,}; give as many of each, which are paired in their "
            "order, or one of either"
        )
    return a.repeated(n), b.repeated(n)


def read_condition(given: Arguments, argument: str, asked: Mapping[str, Any], n: int, flow: LoadedFlow) -> End:
    """Return an end at a condition; problems are added to `given`. A label that is not named is left open."""
    vocabulary, found = flow.vocabulary, {}
    for name, value in asked.items():
        try:
            label = vocabulary.label(str(name))
            found[label.name] = None if (own := class_name(value)) is None else label.class_of(own)
        except UnknownNameError as error:
            given.problems.append(f"{argument}[{name!r}]: {error}")
    text = ", ".join(f"{k}={v}" for k, v in found.items() if v is not None) or "no labels"
    return End([text] * n, _ids(found, n, vocabulary))


def _ids(condition: Mapping[str, str | None], n: int, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    return {x.name: np.repeat(x.encode([condition.get(x.name)]), n) for x in vocabulary.labels}


def spherical(x0: Tensor, x1: Tensor, place: float) -> Tensor:
    """Return the point between x0 and x1, both (b, m, e), at a place in 0 .. 1, along the arc of each cell."""
    a, b = x0.flatten(1), x1.flatten(1)
    cosine = (torch.nn.functional.normalize(a, dim=1) * torch.nn.functional.normalize(b, dim=1)).sum(1)
    angle = torch.arccos(cosine.clamp(-1, 1))[:, None]
    # Opposite noises have no one arc between them; they do not occur in practice, and the line is as good as any.
    straight = torch.sin(angle) < PARALLEL
    below = torch.where(straight, torch.ones_like(angle), torch.sin(angle))
    w0 = torch.where(straight, torch.full_like(angle, 1 - place), torch.sin((1 - place) * angle) / below)
    w1 = torch.where(straight, torch.full_like(angle, place), torch.sin(place * angle) / below)
    return (w0 * a + w1 * b).view_as(x0)


@torch.no_grad()
def between(
    flow: LoadedFlow, x0: Tensor, ids: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], place: float,
    sampler: SamplerConfig,
) -> Tensor:  # fmt: skip
    """Carry noise x0 (b, m, e) to latents by the velocity between those of two conditions."""
    fields = [guided_velocity(flow.dit, of, scale=sampler.guidance, path=flow.path, one_time=True) for of in ids]
    same = all(torch.equal(own, ids[1][name]) for name, own in ids[0].items())
    if same or place in (0.0, 1.0):
        velocity = fields[0] if same else fields[int(place)]
    else:

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return (1 - place) * fields[0](x, t) + place * fields[1](x, t)

    grid = time_grid(sampler, flow.path)
    return solve_ode(velocity, x0, grid, solver=sampler.solver, rtol=sampler.rtol, atol=sampler.atol).x


def interpolated(
    ends: tuple[End, End], way: Way, *, vae: LoadedVAE, flow: LoadedFlow, library_size: float, about: Mapping[str, Any]
) -> anndata.AnnData:
    """Return cells at the places of the path of each pair, pair after pair.

    Args:
        library_size: Of all cells.
        about: Provenance, for uns["scldm"].
    """
    n_pairs, n_places = len(ends[0].names), len(way.places)
    check_dense_fits(n_pairs * n_places, vae.vocabulary.n_genes)
    latents = np.concatenate(list(_paths(ends, way, vae=vae, flow=flow)))
    z = torch.from_numpy(latents).flatten(0, 1)  # (b s, m, e)
    device = next(vae.vae.parameters()).device
    values: list[sp.csr_matrix] = []
    means, kept = [], []
    for start in range(0, len(z), tile := tile_cells(vae, device)):
        part = z[start : start + tile].to(device)
        with torch.inference_mode():
            decoded = vae.vae.decode(part, torch.full((len(part),), library_size, device=device))
        values.append(draw_sparse(decoded, list(range(start, start + len(part))), seed=way.seed))
        means.append(decoded.mu.float().cpu().numpy())
        kept.append(flat(part))
    pair, place = np.repeat(np.arange(n_pairs), n_places), np.tile(way.places, n_pairs)
    obs = pd.DataFrame(
        {
            "pair": pair, "place": place, "is_synthetic": True, "library_size": np.float32(library_size),
            "from": np.array(ends[0].names, dtype=object)[pair], "to": np.array(ends[1].names, dtype=object)[pair],
        },
        index=pd.Index([f"pair-{p}-{k:.3f}" for p, k in zip(pair, place, strict=True)], dtype=str),
    )  # fmt: skip
    made = made_cells(vae, values, kept, obs, about)
    made.layers["mean"] = np.concatenate(means)
    return made


def _paths(ends: tuple[End, End], way: Way, *, vae: LoadedVAE, flow: LoadedFlow) -> Iterator[np.ndarray]:
    """Yield the latents of the paths of tiles of pairs, (b, s, m, e); of real cells, their own latents at the ends."""
    device = next(vae.vae.parameters()).device
    own: list[list[Tensor]] = [
        [] if end.cells is None or end.adata is None else _encoded(vae, end.cells, end.adata) for end in ends
    ]
    size = tile_cells(vae, device)
    for i, start in enumerate(range(0, len(ends[0].names), size)):
        rows = slice(start, start + size)
        ids = [{k: torch.from_numpy(v[rows]).to(device) for k, v in end.conditions.items()} for end in ends]
        n = len(ends[0].names[rows])
        if own[0]:
            noise = [to_noise(flow, z[i], of, way.sampler) for z, of in zip(own, ids, strict=True)]
        else:
            noise = [fresh_noise(flow, range(start, start + n), seed=way.seed).to(device)] * 2
        path = [
            between(flow, spherical(noise[0], noise[1], k), (ids[0], ids[1]), k, way.sampler)
            for k in way.places.tolist()
        ]
        for z, k in zip(own, (0, -1), strict=True):
            if z:
                path[k] = z[i]
        yield torch.stack(path, dim=1).cpu().numpy()


def _encoded(vae: LoadedVAE, cells: AlignedCells, adata: anndata.AnnData) -> list[Tensor]:
    return list(each_batch(torch.inference_mode()(vae.vae.encode), vae, None, cells, adata))
