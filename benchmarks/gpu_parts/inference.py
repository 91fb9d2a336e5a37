"""Encoding and generation of the middle VAE: cells/s with all that a job does but its files, by precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from gpu_parts.clock import free, timed
from gpu_parts.plan import Budget, Outcome, described
from gpu_parts.sizes import PRECISIONS, Sizes, make_cells, products
from gpu_parts.steps import rows_of
from pipeline.planning.cost import encode_flops, generate_flops
from scldm.checkpoints.native import LoadedFlow, LoadedVAE
from scldm.data.library_size import LibrarySizes, LogNormal
from scldm.data.vocabulary import LabelVocabulary, Vocabulary
from scldm.flow.config import PathConfig, SamplerConfig
from scldm.generation.cell_maker import CellMaker, Recipe
from scldm.nn.dit import DiT
from scldm.nn.vae import VAE


def inference(sizes: Sizes) -> Callable[[Outcome, Budget], None]:
    """Return a part that encodes and generates."""

    def work(outcome: Outcome, budget: Budget) -> None:
        vae, flow = models(sizes)
        jobs = {"encode": lambda: _encode(vae, sizes), "generate": lambda: _generate(vae, flow, sizes)}
        for precision in PRECISIONS:
            for name, build in jobs.items():
                if budget.left() < 0:
                    outcome.notes.append(f"{name}.{precision}: not reached in time")
                    continue
                try:
                    call, cells, flops = build()
                    with products(precision, sizes.device):
                        found = timed(call, sizes.device, seconds=sizes.seconds, warm=1)
                except Exception as error:
                    outcome.errors.append(f"{name}.{precision}: {described(error)}")
                    continue
                label = f"{sizes.inference_vae[0]}.{name}.{precision}"
                outcome.rows += rows_of(label, cells / found.seconds, found, flops, precision, sizes)
                free(sizes.device)

    return work


def models(sizes: Sizes) -> tuple[LoadedVAE, LoadedFlow]:
    """Return a VAE and a flow with random weights, as they would be read from their folders."""
    torch.manual_seed(0)
    (_, config), (m, e) = sizes.inference_vae, sizes.latent
    genes = tuple(f"g{i}" for i in range(sizes.n_genes))
    names = Vocabulary(genes, genes, (LabelVocabulary("cell_type", ("T", "B")),))
    library = LibrarySizes({"all": LogNormal(np.log(2.0 * sizes.expressed), 0.5, 2)})
    vae = VAE(config, n_genes=sizes.n_genes).to(sizes.device).eval()
    dit = DiT(sizes.dit[1], n_latent_tokens=m, latent_width=e, n_classes={"cell_type": 2}).to(sizes.device).eval()
    loaded = LoadedVAE(vae, names, library)
    return loaded, LoadedFlow(dit, PathConfig(), names, library, m, e)


Job = tuple[Callable[[], object], int, float]  # a call, its cells, its operations


def _encode(vae: LoadedVAE, sizes: Sizes) -> Job:
    """One batch, copied to the device and its latents back."""
    cells = make_cells(sizes.encoded, sizes).to("cpu")

    @torch.inference_mode()
    def call() -> object:
        return vae.vae.encode(cells.to(sizes.device)).float().cpu()

    return call, sizes.encoded, encode_flops(vae.vae.config, cells=sizes.encoded, expressed=sizes.expressed)


def _generate(vae: LoadedVAE, flow: LoadedFlow, sizes: Sizes) -> Job:
    """Latents by the default sampler, decoding, and counts drawn on the host."""
    n, sampler = sizes.generated, SamplerConfig()
    recipe = Recipe(
        np.array([n]), {"cell_type": np.zeros(1, np.int64)}, {}, np.full(1, np.log(2.0 * sizes.expressed)), np.zeros(1)
    )
    maker = CellMaker(vae, flow, recipe, sampler=sampler, seed=0)
    flops = generate_flops(flow.dit.config, vae.vae.config, sampler, cells=n, n_genes=sizes.n_genes)
    return lambda: [cells.values.nnz for cells in maker.cells(0, n)], n, flops
