"""A VAE, a flow and cells whose numbers bf16 would round visibly if they were not kept in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scldm.data.batch import CellBatch
from scldm.flow.config import PathConfig, SamplerConfig, Solver
from scldm.flow.sampler import sample_latents
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.nn.dit import DiT
from scldm.nn.kernels.precision import Precision, set_precision
from scldm.nn.vae import VAE

N_GENES = 300


def a_vae(**choices) -> VAE:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(**{"d_model": 32, "n_layers": 2, "n_heads": 4, **choices}), n_genes=N_GENES)
    with torch.no_grad():
        vae.gene_embedding.normal_(std=0.5)
        if vae.gene_bias is not None:
            vae.gene_bias.copy_(torch.linspace(-12, -3, N_GENES))  # where bf16 would round by up to 0.03
        if vae.log_theta is not None:
            vae.log_theta.uniform_(-1, 3)
    return vae.eval().requires_grad_(False)


def some_cells() -> CellBatch:
    g = torch.Generator().manual_seed(1)
    counts = torch.poisson(torch.rand(24, N_GENES, generator=g).square() * 4, generator=g)
    return CellBatch.from_dense(counts)


def a_dit() -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(d_model=64, n_layers=3, n_heads=4)
    dit = DiT(config, n_latent_tokens=4, latent_width=8, n_classes={"a": 3}).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return dit.eval()


def in_precision(network: Any, precision: Precision | None) -> Any:
    set_precision(network, precision)
    return network


def latents_of(dit: DiT, solver: Solver) -> Tensor:
    """Sample 16 cells, (16, 4, 8), on the device of the network."""
    device = next(dit.parameters()).device
    x0 = torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(2)).to(device)
    conditions = {"a": (torch.arange(16) % 4).to(device)}
    return sample_latents(dit, x0, conditions, SamplerConfig(solver=solver, steps=8, guidance=2.0), PathConfig())
