"""The two ways to generate that are compared, end to end: ours, and upstream's recipe with the same weights.

Upstream (`reference/upstream.md`): dopri5 at 1e-5 with torchdiffeq's overshoot, a batch that carries an unconditional
copy of every cell, so three evaluations a cell and stage; every decoded row through the whole decoder, dense counts of
both halves kept in memory, one h5ad at the end. It has no shards, no noise per cell, no restart.

Shape letters: b cells, g genes, m latent tokens, e latent width.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import plain_model as plain
import torch
from torch import Tensor

from pipeline.config.job import GenerateConfig
from pipeline.core.files import flush_to_disk, write_json_atomic
from pipeline.inference.generator import Generator, GeneratorSpec
from scldm.checkpoints.native import save_flow, save_vae
from scldm.data.library_size import LibrarySizes, LogNormal
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.flow.config import Distilled, PathConfig, SamplerConfig
from scldm.flow.solvers import Solution, solve_dopri5
from scldm.generation.recipe import genes_table
from scldm.generation.request import Request, RequestRow
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE

LABEL = LabelVocabulary("clusters", tuple(f"c{i:02d}" for i in range(14)))
LIBRARY = LogNormal(8.5, 0.4, 1000)
EVALUATIONS = (1, 2, 4)  # of distilled flows


@dataclass(frozen=True)
class Size:
    """Of both models. Upstream's defaults: 8 + 8 layers of width 32, DiT of 8 layers and width 256."""

    n_genes: int = 17_002
    d_model: int = 32
    n_layers: int = 8
    flow_width: int = 256
    flow_layers: int = 8
    n_latent_tokens: int = 16
    latent_width: int = 16


UPSTREAM = Size()
QUICK = Size(n_genes=4_000, n_layers=2, flow_width=128, flow_layers=2)
SMALL = Size(n_genes=500, d_model=8, n_layers=1, flow_width=16, flow_layers=1, n_latent_tokens=4, latent_width=4)


@dataclass(frozen=True)
class Pair:
    """Models in memory and on disk."""

    vae: VAE
    dit: DiT
    folder: Path


def build_pair(size: Size, folder: Path) -> Pair:
    """Random weights; gates and head away from zero, a spread of expression like a cell's."""
    torch.manual_seed(0)
    config = VAEConfig(
        d_model=size.d_model, n_layers=size.n_layers, n_heads=8, n_heads_cross=4, n_latent_tokens=size.n_latent_tokens,
        latent_width=size.latent_width, input="log1p", gene_bias=False, genes_seq_len=6_147,
    )  # fmt: skip
    vae = VAE(config, n_genes=size.n_genes)
    dit = DiT(
        DiTConfig(d_model=size.flow_width, n_layers=size.flow_layers, n_heads=8, strategy="mutually_exclusive"),
        n_latent_tokens=size.n_latent_tokens, latent_width=size.latent_width,
        n_classes={LABEL.name: len(LABEL.classes)},
    )  # fmt: skip
    with torch.no_grad():
        vae.gene_embedding.normal_()
        for parameter in dit.parameters():
            parameter.add_(0.06 * torch.randn_like(parameter))
        dit.head.linear.weight.mul_(4.0)  # as hard for a solver as a trained flow: midpoint x 10 is off by some 1e-2
        spread = (
            plain.decode(vae, torch.randn(2, size.n_latent_tokens, size.latent_width), torch.ones(2))[0].log().std()
        )
        vae.decoder.head.weight.mul_(2.0 / spread)  # proportions over some powers of ten, as in a cell
    names = tuple(f"g{i}" for i in range(size.n_genes))
    vocabulary, sizes = Vocabulary(names, names, (LABEL,)), LibrarySizes({"all": LIBRARY})
    save_vae(folder / "vae", vae, vocabulary, sizes, card="")
    save_flow(
        folder / "flow", {"model": dit.state_dict(), "raw": dit.state_dict()}, config=dit.config, path=PathConfig(),
        latent_shape=(size.n_latent_tokens, size.latent_width), vocabulary=vocabulary, library_sizes=sizes, card="",
    )  # fmt: skip
    for n in EVALUATIONS:  # the same weights: what they are changes no time
        save_flow(
            folder / f"distilled{n}", {"model": dit.state_dict(), "raw": dit.state_dict()}, config=dit.config,
            path=PathConfig(), latent_shape=(size.n_latent_tokens, size.latent_width), vocabulary=vocabulary,
            library_sizes=sizes, card="", distilled=Distilled(evaluations=n, guidance=1.0, teacher=""),
        )  # fmt: skip
    return Pair(vae.eval().requires_grad_(False), dit.eval().requires_grad_(False), folder)


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def our_actor(
    pair: Pair, n_cells: int, sampler: SamplerConfig, shard_size: int | None = None, *, flow: str = "flow"
) -> Generator:
    """What makes shards in a job, without Ray around it."""
    folder = pair.folder / "cells"
    folder.mkdir(exist_ok=True)
    tokens, width = pair.vae.config.n_latent_tokens, pair.vae.config.latent_width
    config = GenerateConfig(cells=[], sampler=sampler, shard_size=shard_size or n_cells)
    share = n_cells // len(LABEL.classes)
    counts = [share] * (len(LABEL.classes) - 1) + [n_cells - share * (len(LABEL.classes) - 1)]
    rows = (RequestRow({LABEL.name: c}, n) for c, n in zip(LABEL.classes, counts, strict=True))
    return Generator(GeneratorSpec(
        folder=folder, vae=pair.folder / "vae", flow=pair.folder / flow, config=config, request=Request(tuple(rows)),
        genes=None, threads=torch.get_num_threads(), latent_shape=(tokens, width),
        library_sizes=LibrarySizes.load(pair.folder / "flow" / "library_size.json"), prefix="x", digits=9,
        provenance={"schema_version": 2}, run=str(time.time_ns()), fault="",
    ))  # fmt: skip


def our_cells(actor: Generator) -> None:
    """One committed shard."""
    actor.spec = replace(actor.spec, run=str(time.time_ns()))
    actor.make(0)


def our_phases(actor: Generator) -> dict[str, float]:
    """The same work, phase by phase, one after the other."""
    from pipeline.inference.shard_writer import ShardFile

    clock, maker = Clock(), actor.maker
    n = actor.spec.request.n_cells
    out = ShardFile(actor.spec.folder / "phases.h5ad", n_genes=len(actor.genes), latent_width=maker.vae.vae.config.n_latent_tokens * maker.vae.vae.config.latent_width)  # fmt: skip # noqa: E501
    library = []
    with out:
        for first in range(0, n, maker.tile):
            ids = np.arange(first, first + maker.tile)
            with clock.phase("flow"):
                z = maker.latents(ids)
            with clock.phase("decode"):
                tile = maker.decode(ids, z, slice(0, min(maker.tile, n - first)))
            with clock.phase("draw"):
                cells = maker.drawn(tile)
            with clock.phase("write"):
                out.add(cells.values, cells.latents)
            library.append(cells.library_size)
        with clock.phase("write"):
            out.finish(
                actor._obs(np.arange(n), np.concatenate(library), out, 0),
                genes_table(actor.vocabulary, actor.genes),
                {},
            )
            flush_to_disk(out.path)
            write_json_atomic(actor.spec.folder / "phases.json", {})
    return {name: n / seconds for name, seconds in clock.seconds.items()}


def upstream_latents(
    dit: DiT, x0: Tensor, conditions: dict[str, Tensor], scale: float, *, tolerance: float = 1e-5
) -> Solution:
    """Both halves (2 b, m, e): unconditional, then guided."""
    n = len(x0)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        null = dit(x, t, {})
        conditional = dit(x[n:], t[n:], conditions)
        return torch.cat([null[:n], null[n:] + scale * (conditional - null[n:])])

    return solve_dopri5(velocity, torch.cat([x0, x0]), 0.0, 1.0, rtol=tolerance, atol=tolerance, overshoot=True)


@torch.inference_mode()
def upstream_cells(pair: Pair, n_cells: int, scale: float, *, batch_size: int = 32) -> None:
    """Upstream's recipe, to one h5ad."""
    import anndata

    g = torch.Generator().manual_seed(0)
    dense = []
    for start in range(0, n_cells, batch_size):
        b = min(batch_size, n_cells - start)
        x0 = torch.randn(b, pair.vae.config.n_latent_tokens, pair.vae.config.latent_width, generator=g)
        ids = {LABEL.name: torch.randint(0, len(LABEL.classes), (b,), generator=g)}
        z = upstream_latents(pair.dit, x0, ids, scale).x
        size = (LIBRARY.mean + LIBRARY.sd * torch.randn(2 * b, generator=g)).exp()
        mu, theta = plain.decode(pair.vae, z, size)
        rate = torch._standard_gamma(theta.expand_as(mu), generator=g) * (mu / theta)
        dense.append(torch.poisson(rate, generator=g))  # both halves, dense
    guided = np.concatenate([rows[len(rows) // 2 :].numpy() for rows in dense])
    anndata.AnnData(guided).write_h5ad(pair.folder / "upstream.h5ad", compression="gzip")
